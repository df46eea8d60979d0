//! Renames the tensors of single files to diffusers' names, which the networks use. Single files have the names of the
//! networks' first publications: `input_blocks.4.1.…` for `down_blocks.1.attentions.0.…`, and so on.

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::weights::open::Weights;

/// The tensor that identifies the names, possibly with a prefix.
const MARK: &str = "input_hint_block.0.weight";

/// Renames the tensors of a ControlNet, if they are not named as in diffusers.
pub(crate) struct RenameControl;

impl Worker<Weights> for RenameControl {
    type Output = Weights;

    /// # Errors
    /// `model_corrupt` where two tensors would have one name.
    fn run(&self, weights: Weights, _: &Context) -> Result<Weights> {
        let names = || weights.tensors().map(|(name, _)| name);
        let Some(prefix) = names().find_map(|name| name.strip_suffix(MARK)).map(str::to_owned) else {
            return Ok(weights);
        };
        let own = || names().filter_map(|name| name.strip_prefix(&prefix));
        let hint = |name: &str| Some(number(name.strip_prefix("input_hint_block.")?)?.0);
        let layout = ControlNames { unet: UnetNames::of(own()), last_hint: own().filter_map(hint).max().unwrap_or(0) };
        weights.renamed(|name| {
            let name = name.strip_prefix(&prefix)?;
            layout.rename(name)
        })
    }
}

/// The names of a ControlNet.
#[derive(Clone, Copy)]
struct ControlNames {
    unet: UnetNames,
    /// The number of the last convolution of the hint.
    last_hint: usize,
}

impl ControlNames {
    /// `None` for a name that belongs to no part of the network.
    fn rename(self, name: &str) -> Option<String> {
        if let Some(rest) = name.strip_prefix("middle_block_out.0.") {
            return Some(format!("controlnet_mid_block.{rest}"));
        }
        if let Some((i, rest)) = name.strip_prefix("zero_convs.").and_then(number) {
            return Some(format!("controlnet_down_blocks.{i}.{}", rest.strip_prefix("0.")?));
        }
        if let Some((i, rest)) = name.strip_prefix("input_hint_block.").and_then(number) {
            // Between the convolutions stand activations, which have numbers as well.
            return match i {
                0 => Some(format!("controlnet_cond_embedding.conv_in.{rest}")),
                i if i == self.last_hint => Some(format!("controlnet_cond_embedding.conv_out.{rest}")),
                i => Some(format!("controlnet_cond_embedding.blocks.{}.{rest}", (i / 2).checked_sub(1)?)),
            };
        }
        self.unet.rename(name)
    }
}

/// The names of a UNet. Their numbers depend on the count of layers.
#[derive(Clone, Copy)]
pub(crate) struct UnetNames {
    /// Residual blocks of each down block; up blocks have one more.
    pub(crate) layers: usize,
}

impl UnetNames {
    /// The names of a UNet that has these tensors.
    pub(crate) fn of<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        // A change of resolution ends a block of layers.
        let ends = names.filter(|name| name.contains(".0.op.")).filter_map(|name| name.strip_prefix("input_blocks."));
        let layers = ends.filter_map(number).map(|(end, _)| end.saturating_sub(1)).min();
        Self { layers: layers.unwrap_or(usize::MAX - 1) }
    }

    /// diffusers' name of a tensor or layer that single files call `name`, without the prefix of its network; `None` for a
    /// name that belongs to no part of the network.
    pub(crate) fn rename(self, name: &str) -> Option<String> {
        for (old, new) in [
            ("time_embed.0.", "time_embedding.linear_1."),
            ("time_embed.2.", "time_embedding.linear_2."),
            ("label_emb.0.0.", "add_embedding.linear_1."),
            ("label_emb.0.2.", "add_embedding.linear_2."),
            ("input_blocks.0.0.", "conv_in."),
            ("out.0.", "conv_norm_out."),
            ("out.2.", "conv_out."),
        ] {
            if let Some(rest) = name.strip_prefix(old) {
                return Some(format!("{new}{rest}"));
            }
        }
        if let Some((i, rest)) = name.strip_prefix("middle_block.").and_then(number) {
            return match i {
                1 => Some(format!("mid_block.attentions.0.{rest}")),
                i => Some(format!("mid_block.resnets.{}.{}", i / 2, resnet(rest)?)),
            };
        }
        if let Some((i, rest)) = name.strip_prefix("output_blocks.").and_then(number) {
            let (part, rest) = number(rest)?;
            let (block, layer) = (i / (self.layers + 1), i % (self.layers + 1));
            return match (part, rest.strip_prefix("conv.")) {
                (0, _) => Some(format!("up_blocks.{block}.resnets.{layer}.{}", resnet(rest)?)),
                // A change of resolution comes last, behind the transformers where there are some.
                (_, Some(rest)) => Some(format!("up_blocks.{block}.upsamplers.0.conv.{rest}")),
                (_, None) => Some(format!("up_blocks.{block}.attentions.{layer}.{rest}")),
            };
        }
        let (i, rest) = name.strip_prefix("input_blocks.").and_then(number)?;
        let (part, rest) = number(rest)?;
        let (block, layer) = ((i.checked_sub(1)?) / (self.layers + 1), (i - 1) % (self.layers + 1));
        match (part, rest.strip_prefix("op.")) {
            (0, Some(rest)) => Some(format!("down_blocks.{block}.downsamplers.0.conv.{rest}")),
            (0, None) => Some(format!("down_blocks.{block}.resnets.{layer}.{}", resnet(rest)?)),
            _ => Some(format!("down_blocks.{block}.attentions.{layer}.{rest}")),
        }
    }
}

/// A name within a residual block.
fn resnet(name: &str) -> Option<String> {
    let parts = [
        ("in_layers.0.", "norm1."),
        ("in_layers.2.", "conv1."),
        ("emb_layers.1.", "time_emb_proj."),
        ("out_layers.0.", "norm2."),
        ("out_layers.3.", "conv2."),
        ("skip_connection.", "conv_shortcut."),
    ];
    parts.iter().find_map(|(old, new)| name.strip_prefix(old).map(|rest| format!("{new}{rest}")))
}

/// The number before the first dot, and the rest after it.
pub(crate) fn number(name: &str) -> Option<(usize, &str)> {
    let (number, rest) = name.split_once('.')?;
    Some((number.parse().ok()?, rest))
}
