//! Workers of the conditioning domain.

pub(crate) mod emphasis;
pub(crate) mod encode;
pub(crate) mod image_adapters;
pub(crate) mod init_image;
pub(crate) mod inpaint_fill;
pub(crate) mod mask;
pub(crate) mod preprocess;
pub(crate) mod prompt_attention;
pub(crate) mod prompt_chunks;
pub(crate) mod prompt_editing;
pub(crate) mod resize;
