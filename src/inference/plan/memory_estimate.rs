//! Arithmetic on a generation's estimated memory: its peak under each [`MemoryPlan`].

use crate::inference::request::memory::{DecodeExtent, MemoryPlan, Offload, PartBytes};
use crate::model::weights::size::{AdaptedBytes, WeightBytes};
use crate::units::Bytes;

/// Estimated memory of a generation.
#[derive(Clone, Debug)]
pub struct MemoryEstimate {
    /// Each network that it uses, once.
    pub(crate) networks: Vec<NetworkEstimate>,
    pub(crate) activations: ActivationEstimate,
}

/// A kind of network. Text encoders of one model count as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NetworkPart {
    TextEncoders,
    Unet,
    Vae,
    ControlNet,
    Adapter,
    Lora,
    /// Vocabularies and merges; no weights.
    Tokenizers,
}

/// Estimated memory of one network's weights.
#[derive(Clone, Debug)]
pub(crate) struct NetworkEstimate {
    pub(crate) part: NetworkPart,
    /// The model's name in requests.
    pub(crate) name: String,
    pub(crate) weights: WeightBytes,
    pub(crate) loaded: bool,
    pub(crate) pinned: bool,
    /// True if a UNet is in memory in offloaded form.
    pub(crate) loaded_offloaded: bool,
    /// Extra bytes for adapted layers when the base network is already loaded.
    pub(crate) adapted: Bytes,
    /// Index among the models that run one after another; `None` if all of them use it.
    pub(crate) model: Option<usize>,
}

/// Estimated feature maps, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ActivationEstimate {
    /// One guidance pass of the UNet.
    pub(crate) pass: f64,
    /// Guidance passes of one step, at most.
    pub(crate) passes: usize,
    /// Keys and values of the text in all passes.
    pub(crate) text: f64,
    pub(crate) decode: ExtentBytes,
    /// `None` if no image is encoded.
    pub(crate) encode: Option<ExtentBytes>,
    /// Working memory of threads, at all times.
    pub(crate) workspace: f64,
}

/// Feature maps of the VAE's encoder or decoder by extent, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExtentBytes {
    pub(crate) whole: f64,
    pub(crate) strips: f64,
}

impl MemoryEstimate {
    /// Bytes of all weights.
    #[must_use]
    pub fn weights(&self) -> Bytes {
        let weights = self.networks.iter().filter(|network| network.part != NetworkPart::Tokenizers);
        weights.map(|network| network.weights.total).sum()
    }

    /// Bytes by network.
    #[must_use]
    pub fn parts(&self) -> Vec<PartBytes> {
        self.networks.iter().map(NetworkEstimate::report).collect()
    }

    /// Bytes to allocate, less those that freed weights return. A refiner replaces its base if memory is too short for
    /// both.
    #[must_use]
    pub fn needed(&self, plan: MemoryPlan) -> Bytes {
        let last = self.networks.iter().filter_map(|network| network.model).max().unwrap_or(0);
        let peak = (0..=last).map(|model| {
            let sum = |bytes: &dyn Fn(&NetworkEstimate) -> i64| -> i64 {
                self.networks.iter().filter(|one| one.model.is_none_or(|own| own == model)).map(bytes).sum()
            };
            let denoising = sum(&|network| network.while_denoising(plan)) + self.activations.peak(plan).0 as i64;
            if plan.offload == Offload::None {
                return denoising;
            }
            // Text encoders that are freed are gone before later networks are loaded.
            let encodes_images = self.activations.encode.is_some();
            let encoding = sum(&|network| network.while_encoding(encodes_images)) + self.activations.workspace as i64;
            denoising.max(encoding)
        });
        Bytes(peak.max().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0))
    }

    /// The same for an image of `scale` times as many pixels.
    #[must_use]
    pub fn scaled(&self, scale: f64) -> Self {
        let ActivationEstimate { pass, decode, encode, .. } = self.activations;
        let activations = ActivationEstimate {
            pass: pass * scale,
            decode: decode.scaled(scale),
            encode: encode.map(|encode| encode.scaled(scale)),
            ..self.activations
        };
        Self { activations, ..self.clone() }
    }
}

impl ActivationEstimate {
    /// Feature maps of the UNet and the text.
    pub(crate) fn denoise(&self, plan: MemoryPlan) -> Bytes {
        Bytes((self.text + self.pass * if plan.slice { 1.0 } else { self.passes as f64 }) as u64)
    }

    /// Feature maps of the decoder and the text.
    pub(crate) fn decode(&self, plan: MemoryPlan) -> Bytes {
        Bytes((self.text + self.decode.of(plan)) as u64)
    }

    /// The largest sum at any time.
    pub(crate) fn peak(&self, plan: MemoryPlan) -> Bytes {
        let encode = self.encode.map_or(0.0, |encode| encode.of(plan));
        self.denoise(plan).max(self.decode(plan)).max(Bytes(encode as u64)) + Bytes(self.workspace as u64)
    }
}

impl ExtentBytes {
    fn of(self, plan: MemoryPlan) -> f64 {
        if plan.decode == DecodeExtent::Strips { self.strips } else { self.whole }
    }

    fn scaled(self, scale: f64) -> Self {
        Self { whole: self.whole * scale, strips: self.strips * scale }
    }
}

impl NetworkPart {
    /// Its name on the wire.
    fn name(self) -> &'static str {
        match self {
            Self::TextEncoders => "text_encoders",
            Self::Unet => "unet",
            Self::Vae => "vae",
            Self::ControlNet => "controlnet",
            Self::Adapter => "adapter",
            Self::Lora => "lora",
            Self::Tokenizers => "tokenizers",
        }
    }
}

impl NetworkEstimate {
    fn report(&self) -> PartBytes {
        PartBytes {
            part: self.part.name(),
            name: self.name.clone(),
            bytes: self.weights.total,
            mapped: self.weights.mapped,
            loaded: self.loaded,
        }
    }

    /// Adds layers that adapters change: they are allocated again, unless the adapted network is loaded.
    pub(crate) fn adapt(&mut self, layers: AdaptedBytes, is_loaded: bool, on_host: bool) {
        let AdaptedBytes { before, after } = layers;
        let WeightBytes { total, mapped, offloaded, .. } = self.weights;
        let more = if on_host { after.saturating_sub(before.offloaded) } else { Bytes(0) };
        self.weights.total = total + after.saturating_sub(before.total);
        self.weights.offloaded = offloaded + more;
        if is_loaded || !self.loaded {
            self.weights.mapped = mapped.saturating_sub(before.mapped);
        } else {
            self.adapted = self.adapted + after.saturating_sub(before.mapped);
        }
    }

    /// Bytes that are allocated already. Mapped files that were read count as free memory.
    fn allocated(&self) -> i64 {
        let WeightBytes { total, mapped, .. } = self.weights;
        if self.loaded { total.saturating_sub(mapped).0 as i64 } else { 0 }
    }

    /// Bytes that the offloaded form in memory holds, and that are free once it is evicted.
    fn allocated_offloaded(&self) -> i64 {
        let WeightBytes { offloaded, transient, .. } = self.weights;
        if self.loaded_offloaded { offloaded.saturating_sub(transient).0 as i64 } else { 0 }
    }

    /// Bytes to allocate for the whole network.
    fn to_allocate(&self) -> i64 {
        (self.weights.total + self.adapted).0 as i64 - self.allocated()
    }

    /// Bytes to allocate while prompts are encoded, before which images have been read.
    fn while_encoding(&self, encodes_images: bool) -> i64 {
        match self.part {
            NetworkPart::TextEncoders | NetworkPart::ControlNet | NetworkPart::Adapter => self.to_allocate(),
            NetworkPart::Vae if encodes_images => self.to_allocate(),
            NetworkPart::Vae | NetworkPart::Unet | NetworkPart::Lora | NetworkPart::Tokenizers => 0,
        }
    }

    /// Bytes to allocate while the image is made; below 0 if more are freed.
    fn while_denoising(&self, plan: MemoryPlan) -> i64 {
        let freed = if self.pinned { 0 } else { self.allocated() };
        match (self.part, plan.offload) {
            (NetworkPart::TextEncoders, Offload::TextEncoders | Offload::Sequential) if !self.pinned => -freed,
            (NetworkPart::Unet, Offload::Sequential) => {
                self.weights.offloaded.0 as i64 - self.allocated_offloaded() - freed
            }
            // The offloaded form is evicted for the whole one.
            (NetworkPart::Unet, _) if !self.pinned => self.to_allocate() - self.allocated_offloaded(),
            _ => self.to_allocate(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        ActivationEstimate, AdaptedBytes, ExtentBytes, MemoryEstimate, NetworkEstimate, NetworkPart, WeightBytes,
    };
    use crate::inference::plan::memory_policy::{AvailableMemory, decide, next_fallback};
    use crate::inference::request::memory::{DecodeExtent, Fallback, MemoryOptions, MemoryUse, Offload};
    use crate::units::Bytes;

    fn network(part: NetworkPart, weights: WeightBytes, loaded: bool) -> NetworkEstimate {
        NetworkEstimate {
            part,
            name: "m".into(),
            weights,
            loaded,
            pinned: false,
            loaded_offloaded: false,
            adapted: Bytes(0),
            model: Some(0),
        }
    }

    /// Text encoders of 100 bytes, a UNet of 500, or 50 if it is offloaded, and feature maps of 200 in two passes, of 400
    /// for whole images and 150 for strips.
    fn estimate(loaded: bool) -> MemoryEstimate {
        let network = |part, total, offloaded| {
            let weights = WeightBytes {
                total: Bytes(total),
                mapped: Bytes(0),
                offloaded: Bytes(offloaded),
                transient: Bytes(20),
            };
            network(part, weights, loaded)
        };
        MemoryEstimate {
            networks: vec![network(NetworkPart::TextEncoders, 100, 100), network(NetworkPart::Unet, 500, 50)],
            activations: ActivationEstimate {
                pass: 100.0,
                passes: 2,
                text: 0.0,
                decode: ExtentBytes { whole: 400.0, strips: 150.0 },
                encode: None,
                workspace: 0.0,
            },
        }
    }

    fn available(free: u64, evictable: u64) -> AvailableMemory {
        AvailableMemory { free: Bytes(free), evictable: Bytes(evictable) }
    }

    fn check(options: MemoryOptions, available: AvailableMemory, fallbacks: &[Fallback], needed: u64, fits: bool) {
        let decision = decide(&estimate(false), options, available);
        assert_eq!(
            (decision.report.fallbacks.as_slice(), decision.needed, decision.fits),
            (fallbacks, Bytes(needed), fits),
            "{available:?}"
        );
    }

    #[test]
    fn fallbacks_are_taken_in_order_as_far_as_they_help() {
        let open = MemoryOptions::default();
        check(open, available(1000, 0), &[], 1000, true);
        check(open, available(999, 1), &[Fallback::Drop], 1000, true);
        check(open, available(998, 1), &[Fallback::Drop, Fallback::Strips], 800, true);
        check(open, available(799, 0), &[Fallback::Strips, Fallback::Slice], 750, true);
        check(open, available(749, 0), &[Fallback::Strips, Fallback::Slice, Fallback::TextEncoders], 650, true);
        let all = [Fallback::Strips, Fallback::Slice, Fallback::TextEncoders, Fallback::Sequential];
        check(open, available(649, 0), &all, 200, true);
        check(open, available(199, 0), &all, 200, false);
    }

    #[test]
    fn requested_choices_stay() {
        let whole = MemoryOptions { decode: DecodeExtent::Whole, ..MemoryOptions::default() };
        // Slicing does not help while the decoder is the peak.
        check(whole, available(900, 0), &[Fallback::TextEncoders], 900, true);
        let nothing = MemoryOptions {
            decode: DecodeExtent::Strips,
            slice: Some(false),
            offload: Offload::None,
            ..MemoryOptions::default()
        };
        check(nothing, available(1, 0), &[], 800, false);
        let sequential = MemoryOptions { offload: Offload::Sequential, ..MemoryOptions::default() };
        check(sequential, available(450, 0), &[], 450, true);
    }

    #[test]
    fn loaded_network_that_is_offloaded_frees_its_bytes() {
        let offloaded = MemoryOptions {
            decode: DecodeExtent::Strips,
            slice: Some(true),
            offload: Offload::TextEncoders,
            ..MemoryOptions::default()
        };
        assert_eq!(estimate(true).needed(offloaded.first()), Bytes(50));
        let kept = MemoryOptions { offload: Offload::None, ..offloaded };
        assert_eq!(estimate(true).needed(kept.first()), Bytes(150));
    }

    #[test]
    fn offloaded_network_in_memory_does_not_count_as_loaded_whole() {
        let mut estimate = estimate(false);
        estimate.networks[1].loaded_offloaded = true;
        let least = MemoryOptions { decode: DecodeExtent::Strips, slice: Some(true), ..MemoryOptions::default() };
        let needed = |offload| estimate.needed(MemoryOptions { offload, ..least }.first());
        // Its 30 bytes are freed when it is loaded whole.
        assert_eq!((needed(Offload::None), needed(Offload::Sequential)), (Bytes(720), Bytes(170)));
    }

    #[test]
    fn images_are_encoded_while_text_encoders_are_loaded() {
        let mut estimate = estimate(false);
        let weights = WeightBytes { total: Bytes(700), ..WeightBytes::default() };
        estimate.networks.push(NetworkEstimate { model: None, ..network(NetworkPart::Vae, weights, false) });
        estimate.activations.encode = Some(ExtentBytes { whole: 1.0, strips: 1.0 });
        let plan = MemoryOptions { offload: Offload::Sequential, ..MemoryOptions::default() }.first();
        let denoising = estimate.needed(plan);
        estimate.networks[0].weights.total = Bytes(1000);
        assert_eq!((denoising, estimate.needed(plan)), (Bytes(1150), Bytes(1700)));
    }

    #[test]
    fn adapted_layers_are_allocated_unless_they_are_loaded() {
        let weights = |total, mapped| WeightBytes { total: Bytes(total), mapped: Bytes(mapped), ..Default::default() };
        let layers = AdaptedBytes { before: weights(120, 100), after: Bytes(240) };
        let needed = |loaded, adapted_loaded| {
            let mut network = network(NetworkPart::Unet, weights(500, 400), loaded);
            network.adapt(layers, adapted_loaded, true);
            network.to_allocate()
        };
        assert_eq!((needed(false, false), needed(true, false), needed(true, true)), (620, 540, 300));
    }

    #[test]
    fn device_out_of_memory_takes_every_fallback_once() {
        let options = MemoryOptions::default();
        let mut report = MemoryUse { plan: options.first(), ..MemoryUse::default() };
        while let Some((fallback, plan)) = next_fallback(options, &report) {
            report.fallbacks.push(fallback);
            report.plan = plan;
        }
        assert_eq!(report.fallbacks, Fallback::ALL);
        assert_eq!(
            (report.plan.decode, report.plan.slice, report.plan.offload),
            (DecodeExtent::Strips, true, Offload::Sequential)
        );
    }
}
