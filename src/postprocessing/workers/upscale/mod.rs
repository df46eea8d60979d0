//! Upscalers by name.

pub(crate) mod bicubic;
pub(crate) mod interpolate;
pub(crate) mod lanczos;
pub(crate) mod latent;
pub(crate) mod latent_bicubic;
pub(crate) mod latent_nearest;

use crate::error::Result;
use crate::postprocessing::upscaler::UpscaleMethod::{Latents, Pixels};
use crate::postprocessing::upscaler::Upscaler;
use crate::registry::Registry;

pub static UPSCALERS: Registry<Upscaler> = Registry::new(
    "upscaler",
    &[
        ("latent", &Upscaler { label: "Latent", method: Latents(&latent::Latent) }),
        ("latent_bicubic", &Upscaler { label: "Latent (bicubic)", method: Latents(&latent_bicubic::LatentBicubic) }),
        ("latent_nearest", &Upscaler { label: "Latent (nearest)", method: Latents(&latent_nearest::LatentNearest) }),
        ("lanczos", &Upscaler { label: "Lanczos", method: Pixels(&lanczos::Lanczos) }),
        ("bicubic", &Upscaler { label: "Bicubic", method: Pixels(&bicubic::Bicubic) }),
    ],
);

/// Finds an upscaler by its own or AUTOMATIC1111's name, ignoring case.
///
/// # Errors
/// `unknown_name` with the nearest name.
pub fn find(name: &str) -> Result<(&'static str, &'static Upscaler)> {
    let matches = |(known, upscaler): &(&'static str, &'static Upscaler)| {
        name.eq_ignore_ascii_case(known) || name.eq_ignore_ascii_case(upscaler.label)
    };
    UPSCALERS.iter().find(matches).ok_or_else(|| UPSCALERS.unknown(name))
}
