//! Estimates the memory of the UNet's feature maps by walking through an evaluation and counting the maps that are alive.
//!
//! Legend: `C` channels. Maps are counted in numbers.

use crate::error::Result;
use crate::model::networks::unet::UnetConfig;
use crate::model::networks::unet_config::{BlockPlan, LayerPlan};

/// Tokens of a prompt of one chunk.
const TOKENS: usize = 77;

/// Numbers that a pass of the UNet holds at its largest moment, for one sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Footprint {
    pub maps: f64,
    /// All skip connections together, which a ControlNet adds to.
    pub skips: f64,
    /// Keys and values of the text, which stay from step to step.
    pub text: f64,
}

/// The walk.
struct Walk {
    /// Positions of the maps at this level.
    positions: f64,
    /// Sizes of the skip connections that wait for the up blocks.
    skips: Vec<f64>,
    most: f64,
    text: f64,
    /// Channels between the two matrices of the feed-forward layer, as a multiple of `C`.
    gated: f64,
}

impl Walk {
    fn see(&mut self, alive: f64) {
        self.most = self.most.max(self.skips.iter().sum::<f64>() + alive);
    }

    /// `waits`: the input is a skip connection, which is counted already.
    fn resnet(&mut self, inputs: usize, outputs: usize, waits: bool) {
        let (inputs, outputs) = (inputs as f64 * self.positions, outputs as f64 * self.positions);
        let own = if waits { 0.0 } else { inputs };
        // Input, normalised input, hidden map.
        self.see(own + inputs + outputs);
        // A shortcut makes a map of its own, and then the input goes.
        let residual = if inputs == outputs { own } else { outputs };
        self.see(own + outputs + if inputs == outputs { 0.0 } else { outputs });
        self.see(residual + 2.0 * outputs);
    }

    fn transformer(&mut self, channels: usize, depth: usize) {
        self.text += (2 * TOKENS * channels * depth) as f64;
        if depth > 0 {
            let map = channels as f64 * self.positions;
            // The input, the tokens, and either queries, keys, values, their input and their result, or the sum so far,
            // its norm, and the wide map between the two matrices.
            self.see(map * (2.0 + f64::max(5.0, 2.0 + self.gated)));
        }
    }

    fn layer(&mut self, layer: &LayerPlan, outputs: usize, waits: bool) {
        self.resnet(layer.inputs, outputs, waits);
        if let Some(depth) = layer.depth {
            self.transformer(outputs, depth);
        }
    }

    fn keep(&mut self, channels: usize) {
        self.skips.push(channels as f64 * self.positions);
    }

    fn down(&mut self, block: &BlockPlan) {
        for layer in &block.layers {
            self.layer(layer, block.outputs, true);
            self.keep(block.outputs);
        }
        if block.resamples {
            self.positions = (self.positions / 4.0).max(1.0);
            self.keep(block.outputs);
        }
    }

    fn up(&mut self, block: &BlockPlan) {
        for layer in &block.layers {
            let joined = layer.inputs as f64 * self.positions;
            // The map and the skip connection, which is counted still, are joined in a third.
            let skip = self.skips.last().copied().unwrap_or(0.0);
            self.see(2.0 * joined - skip);
            self.skips.pop();
            self.layer(layer, block.outputs, false);
        }
        if block.resamples {
            let low = self.positions;
            self.positions *= 4.0;
            let channels = block.outputs as f64;
            self.see(channels * (low + self.positions));
            self.see(channels * 2.0 * self.positions);
        }
    }
}

impl UnetConfig {
    /// Footprint for latents with `positions` rows times columns. `on_host`: the gate is fused with its matrix product, as
    /// in the CPU's kernels.
    ///
    /// # Errors
    /// `model_unsupported` for a configuration that is no such network's.
    pub fn footprint(&self, positions: usize, on_host: bool) -> Result<Footprint> {
        let plan = self.plan("unet")?;
        let width = plan.down.first().map_or(0, |block| block.outputs);
        let gated = if on_host { 4.0 } else { 16.0 };
        let mut walk = Walk { positions: positions as f64, skips: Vec::new(), most: 0.0, text: 0.0, gated };
        walk.keep(width);
        plan.down.iter().for_each(|block| walk.down(block));
        let skips = walk.skips.iter().sum();
        if let Some(mid) = &plan.mid {
            walk.resnet(mid.channels, mid.channels, true);
            if let Some(depth) = mid.depth {
                walk.transformer(mid.channels, depth);
                walk.resnet(mid.channels, mid.channels, false);
            }
        }
        plan.up.iter().for_each(|block| walk.up(block));
        Ok(Footprint { maps: walk.most, skips, text: walk.text })
    }
}
