//! Identifies a single file by its tensor names: an SDXL checkpoint, or another known kind.

use crate::model::weights::open::{Stored, Weights};

/// True if a file holds an SDXL UNet: one with embeddings of sizes and pooled text.
pub(crate) fn is_sdxl(weights: &Weights) -> bool {
    let marks = ["label_emb.0.0.weight", "add_embedding.linear_1.weight"];
    let prefixes = ["model.diffusion_model.", "diffusion_model.", "unet.", ""];
    let named = |mark: &str| prefixes.iter().any(|prefix| weights.has(&format!("{prefix}{mark}")));
    marks.into_iter().any(named) && kind(weights).is_none()
}

/// The kind of a file that is known, and neither an SDXL model nor a component of one.
pub(crate) fn kind(weights: &Weights) -> Option<&'static str> {
    let any = |test: &dyn Fn(&str) -> bool| weights.tensors().any(|(name, _)| test(name));
    let starts = |starts: &[&str]| any(&|name| starts.iter().any(|start| name.starts_with(start)));
    let holds = |parts: &[&str]| any(&|name| parts.iter().any(|part| name.contains(part)));
    if starts(&["lora_unet_", "lora_te", "lycoris_"])
        || holds(&[".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lora.down.", ".hada_w1_a", ".lokr_w", ".oft_"])
    {
        return Some("a LoRA or another adapter, which goes into `loras`");
    }
    if starts(&["control_model.", "controlnet_", "input_hint_block.", "zero_convs."]) || holds(&["lora_controlnet"]) {
        return Some("a ControlNet, which goes into `controlnet`");
    }
    if starts(&["image_proj.", "ip_adapter."]) {
        return Some("an IP-Adapter, which goes into `ip_adapter`");
    }
    if holds(&["joint_blocks."]) {
        return Some("a Stable Diffusion 3 model");
    }
    if holds(&["double_blocks.", "single_transformer_blocks."]) {
        return Some("a Flux model");
    }
    if holds(&["time_stack.", "time_mixer"]) {
        return Some("a Stable Video Diffusion model");
    }
    // The UNet's shapes outweigh tensor names left over from another model.
    if reads_sdxl(weights) {
        return None;
    }
    if starts(&["cond_stage_model.transformer."]) {
        return Some("a Stable Diffusion 1 model");
    }
    if starts(&["cond_stage_model.model."]) {
        return Some("a Stable Diffusion 2 model");
    }
    None
}

/// True if there is a UNet with size embeddings whose cross-attention has the width of SDXL's text.
fn reads_sdxl(weights: &Weights) -> bool {
    let read = |(name, stored): (&str, &Stored)| {
        name.ends_with("attn2.to_k.weight") && matches!(stored.shape.get(1), Some(2048 | 1280))
    };
    weights.tensors().any(read) && weights.tensors().any(|(name, _)| name.ends_with("label_emb.0.0.weight"))
}

/// Describes a file without an SDXL UNet, for the error message.
pub(crate) fn describe(weights: &Weights) -> String {
    if let Some(kind) = kind(weights) {
        return format!("it is {kind}");
    }
    let context = weights.tensors().find(|(name, _)| name.ends_with("attn2.to_k.weight"));
    match context.and_then(|(_, stored)| stored.shape.get(1)) {
        Some(768) => return "it is a UNet of Stable Diffusion 1".to_owned(),
        Some(1024) => return "it is a UNet of Stable Diffusion 2".to_owned(),
        _ => {}
    }
    let has = |name: &str| weights.has(name);
    if has("clip_l") && has("clip_g") || has("emb_params") {
        return "it is a textual inversion, which goes into `embeddings`".to_owned();
    }
    let behind = |end: &str| weights.tensors().any(|(name, _)| name.ends_with(end));
    if behind("decoder.conv_in.weight") {
        return "it is an autoencoder without a UNet: name it in `vae`, with a `model`".to_owned();
    }
    if behind("token_embedding.weight") {
        return "it is a text encoder without a UNet: name it in `text_encoder` or `text_encoder_2`, with a `model`"
            .to_owned();
    }
    match weights.tensors().next() {
        Some((name, _)) => format!("it has no UNet of SDXL; its first tensor is `{name}`"),
        None => "it has no tensors".to_owned(),
    }
}
