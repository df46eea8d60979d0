//! Estimates a generation before it begins: weights from the headers of their files, feature maps from the networks'
//! shapes, time from the throughput of earlier work.

use crate::context::Context;
use crate::device::interface::{Dtype, Quantization};
use crate::error::Result;
use crate::inference::plan::memory_estimate::{
    ActivationEstimate, ExtentBytes, MemoryEstimate, NetworkEstimate, NetworkPart,
};
use crate::inference::plan::{GenerationPlan, PassEntry};
use crate::layers::{Resident, ResidentForm};
use crate::managers::throughput::{Throughput, ThroughputKey, Work};
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::lora::LoraStack;
use crate::model::managers::ENCODERS;
use crate::model::networks::footprint::Footprint;
use crate::model::networks::vae::Extent;
use crate::model::weights::size::{SizeEstimator, WeightBytes, WeightFormat};
use crate::units::Bytes;

/// Vocabularies and merges of both tokenizers, which are CLIP's in every SDXL model.
const TOKENIZERS: Bytes = Bytes(22 * Bytes::MIB);
/// Buffers of the CPU kernels' threads.
const WORKSPACE: Bytes = Bytes(8 * Bytes::MIB);

/// Estimates one generation.
pub(crate) struct Estimator<'a> {
    pub(crate) plan: &'a GenerationPlan,
    /// Adapters of the request's model.
    pub(crate) stack: &'a LoraStack,
    pub(crate) format: WeightFormat,
    pub(crate) ctx: &'a Context,
}

/// A network to be estimated.
struct EstimatedNetwork<'a> {
    part: NetworkPart,
    /// Its [`Resident::kind`].
    kind: &'static str,
    name: &'a str,
    weights: WeightBytes,
    model: Option<usize>,
}

impl Estimator<'_> {
    /// Memory, if `residents` are loaded.
    ///
    /// # Errors
    /// Those of the files' headers; `cancelled`, `deadline_exceeded`.
    pub(crate) fn memory(&self, residents: &[Resident]) -> Result<MemoryEstimate> {
        self.ctx.checkpoint()?;
        let mut networks: Vec<NetworkEstimate> =
            self.networks()?.into_iter().map(|network| self.network(network, residents)).collect();
        self.adapt(&mut networks, residents)?;
        Ok(MemoryEstimate { networks, activations: self.activations()? })
    }

    /// Seconds of all images; `None` until such work was measured.
    pub(crate) fn seconds(&self, throughput: &Throughput) -> Option<f64> {
        let WeightFormat { compute: dtype, quantization, .. } = self.format;
        let key = ThroughputKey { model: self.plan.checkpoint.key, dtype, quantization };
        let guidance = &self.plan.first().guidance;
        let units = self.plan.passes.iter().map(|pass| guidance.evaluations(&pass.sampling) * pass.positions()).sum();
        let denoise = throughput.expect(key, Work::Evaluation, units)?;
        let decode = throughput.expect(key, Work::Decode, self.plan.last().positions())?;
        Some((denoise + decode) * self.plan.seeds.len() as f64)
    }

    /// Evaluations of the UNet for all images.
    pub(crate) fn evaluations(&self) -> usize {
        let evaluations: usize = self.plan.passes.iter().map(|pass| pass.sampling.evaluations()).sum();
        evaluations * self.plan.seeds.len()
    }

    fn activations(&self) -> Result<ActivationEstimate> {
        let (plan, compute) = (self.plan, self.format.compute);
        let (checkpoint, vae) = (&plan.checkpoint, &plan.checkpoint.vae);
        let last = plan.last().positions();
        let most = plan.first().positions().max(last);
        let element = compute.tensor().size_in_bytes();
        // The VAE never computes in f16.
        let vae_element = if compute == Dtype::F16 { Dtype::F32.tensor().size_in_bytes() } else { element };
        let decode = |extent| vae.decode_bytes(64 * last, vae_element, extent) as f64;
        let encode = |extent| vae.encode_bytes(64 * most, vae_element, extent) as f64;
        let takes_mask = checkpoint.unet.in_channels > vae.latent_channels;
        let enlarges = plan.passes.iter().any(|pass| matches!(pass.entry, PassEntry::Pixels(_)));
        let encodes = plan.init_image().is_some() || takes_mask || enlarges;
        let passes = plan.first().guidance.all_roles().len();
        let Footprint { maps, skips, text } = checkpoint.unet.footprint(most, self.format.on_host)?;
        // Residuals of a ControlNet, and the sum to which the next one's are added.
        let residuals = skips * plan.controlnets.len().min(2) as f64;
        Ok(ActivationEstimate {
            pass: (maps + residuals) * element as f64,
            passes,
            text: text * (passes * element) as f64,
            decode: by_extent(decode),
            encode: encodes.then(|| by_extent(encode)),
            workspace: if self.format.on_host { WORKSPACE.0 as f64 } else { 0.0 },
        })
    }

    /// Each network that the plan uses, once.
    fn networks(&self) -> Result<Vec<EstimatedNetwork<'_>>> {
        let (plan, sizes) = (self.plan, SizeEstimator { format: self.format, ctx: self.ctx });
        let mut networks = Vec::new();
        for (index, checkpoint) in self.models().into_iter().enumerate() {
            networks.extend(model_networks(checkpoint, index, sizes)?);
        }
        let shared = |part, kind, name, weights| EstimatedNetwork { part, kind, name, weights, model: None };
        if self.format.on_host {
            let weights = WeightBytes { total: TOKENIZERS, offloaded: TOKENIZERS, ..WeightBytes::default() };
            networks.push(shared(NetworkPart::Tokenizers, "tokenizer", plan.checkpoint.name.as_str(), weights));
        }
        for (index, controlnet) in plan.controlnets.iter().enumerate() {
            if plan.controlnets.iter().take(index).all(|earlier| earlier.file.key != controlnet.file.key) {
                let weights = sizes.controlnet(&controlnet.file, &plan.checkpoint)?;
                networks.push(shared(NetworkPart::ControlNet, "controlnet", &controlnet.file.name, weights));
            }
        }
        for lora in &plan.loras {
            networks.push(shared(NetworkPart::Lora, "lora", &lora.file.name, sizes.component_file(&lora.file)?));
        }
        for (kind, file) in plan.adapters.networks() {
            networks.push(shared(NetworkPart::Adapter, kind, &file.name, sizes.component_file(file)?));
        }
        Ok(networks)
    }

    /// The request's model and those of later passes, once each.
    fn models(&self) -> Vec<&Checkpoint> {
        let mut models: Vec<&Checkpoint> = Vec::new();
        for pass in &self.plan.passes {
            if models.iter().all(|model| model.key != pass.checkpoint.key) {
                models.push(&pass.checkpoint);
            }
        }
        models
    }

    fn network(&self, network: EstimatedNetwork<'_>, residents: &[Resident]) -> NetworkEstimate {
        let loaded = self.resident(&network, residents, false);
        NetworkEstimate {
            part: network.part,
            name: network.name.to_owned(),
            weights: network.weights,
            loaded: loaded.is_some(),
            pinned: loaded.is_some_and(|resident| resident.pinned),
            loaded_offloaded: network.part == NetworkPart::Unet && self.resident(&network, residents, true).is_some(),
            adapted: Bytes(0),
            model: network.model,
        }
    }

    /// The resident that the network is, bare or adapted as the request asks.
    fn resident<'r>(
        &self,
        network: &EstimatedNetwork<'_>,
        residents: &'r [Resident],
        offloaded: bool,
    ) -> Option<&'r Resident> {
        let WeightFormat { compute, quantization, .. } = self.format;
        let quantization = match network.part {
            NetworkPart::Unet | NetworkPart::ControlNet => quantization,
            _ => Quantization::None,
        };
        // The VAE never computes in f16.
        let in_f32 = network.part == NetworkPart::Vae && compute == Dtype::F16;
        let dtype = if in_f32 { Dtype::F32 } else { compute };
        let form = ResidentForm { dtype, quantization, offloaded };
        let mut same = residents.iter().filter(|one| {
            one.kind == network.kind
                && one.name == network.name
                && one.form.is_none_or(|own| own == form)
                && self.plan.uses(one)
        });
        let over = match network.part {
            NetworkPart::Unet => self.stack.key(&[Part::Unet]),
            NetworkPart::TextEncoders => self.stack.key(&ENCODERS),
            _ => return same.next(),
        };
        same.find(|one| one.over.is_none() || over.is_some_and(|over| over.is(one.over)))
    }

    /// Adds what LoRAs change of the request's model.
    fn adapt(&self, networks: &mut [NetworkEstimate], residents: &[Resident]) -> Result<()> {
        let (checkpoint, sizes) = (&self.plan.checkpoint, SizeEstimator { format: self.format, ctx: self.ctx });
        let adaptable =
            [(NetworkPart::TextEncoders, "encoder", &ENCODERS[..]), (NetworkPart::Unet, "unet", &[Part::Unet])];
        for (part, kind, parts) in adaptable {
            let Some(over) = self.stack.key(parts) else { continue };
            let own = networks.iter_mut().find(|one| one.part == part && one.name == checkpoint.name);
            let Some(network) = own else { continue };
            let is_adapted = |one: &Resident| one.kind == kind && one.name == network.name && over.is(one.over);
            let is_loaded = network.loaded && residents.iter().any(is_adapted);
            for &part in parts {
                if part != Part::TextEncoder || checkpoint.text_encoder.is_some() {
                    network.adapt(sizes.adapted(self.stack, checkpoint, part)?, is_loaded, self.format.on_host);
                }
            }
        }
        Ok(())
    }
}

/// The networks of one model; the first model's VAE serves all.
fn model_networks<'a>(
    checkpoint: &'a Checkpoint,
    index: usize,
    sizes: SizeEstimator<'_>,
) -> Result<Vec<EstimatedNetwork<'a>>> {
    let mut encoders = sizes.part(checkpoint, Part::TextEncoder2)?;
    if checkpoint.text_encoder.is_some() {
        encoders = encoders.with(sizes.part(checkpoint, Part::TextEncoder)?);
    }
    let network =
        |part, kind, weights, model| EstimatedNetwork { part, kind, name: checkpoint.name.as_str(), weights, model };
    let mut networks = vec![
        network(NetworkPart::TextEncoders, "encoder", encoders, Some(index)),
        network(NetworkPart::Unet, "unet", sizes.part(checkpoint, Part::Unet)?, Some(index)),
    ];
    if index == 0 {
        networks.push(network(NetworkPart::Vae, "vae", sizes.part(checkpoint, Part::Vae)?, None));
    }
    Ok(networks)
}

fn by_extent(bytes: impl Fn(Extent) -> f64) -> ExtentBytes {
    ExtentBytes { whole: bytes(Extent::Whole), strips: bytes(Extent::Strips) }
}
