//! What a generation will need, before it begins: bytes of weights from the headers of their files, bytes of feature maps
//! from the networks' shapes, seconds from what was measured.

use crate::context::Context;
use crate::device::interface::{Dtype, Quantization};
use crate::error::Result;
use crate::inference::interface::DecodeExtent;
use crate::inference::plan::controlnet::is_of;
use crate::inference::plan::{Entry, GenerationPlan};
use crate::inference::request::memory::{MemoryPlan, Offload, PartBytes};
use crate::layers::{Resident, Worker};
use crate::model::checkpoint::{Checkpoint, Part};
use crate::model::lora::LoraStack;
use crate::model::managers::{self, form};
use crate::model::networks::footprint::Footprint;
use crate::model::networks::vae::Extent;
use crate::model::weights::size::{Holding, Touched, Weighed};
use crate::throughput::{Throughput, Work};
use crate::units::{Bytes, ImageSize};

/// Vocabularies and merges of both tokenizers, which are CLIP's in every SDXL model.
const TOKENIZERS: Bytes = Bytes(22 * Bytes::MIB);
/// Blocks that the CPU's kernels lay their numbers in.
const WORKING: Bytes = Bytes(8 * Bytes::MIB);
/// Parts that may leave.
const ENCODERS: &str = "text_encoders";
const UNET: &str = "unet";
/// Parts that look at images before the text is read.
const VAE: &str = "vae";
const CONTROLNET: &str = "controlnet";
const ADAPTER: &str = "adapter";
/// What is no weights.
const VOCABULARIES: &str = "tokenizers";

pub struct Estimation;

pub struct EstimateTask<'a> {
    pub plan: &'a GenerationPlan,
    /// What lies over the networks of its model.
    pub stack: &'a LoraStack,
    pub holding: Holding,
    /// Under which name the model's time is remembered.
    pub key: &'a str,
    pub throughput: &'a Throughput,
    /// What is in memory.
    pub residents: &'a [Resident],
}

/// What a generation needs, by part.
#[derive(Clone, Debug)]
pub struct Needs {
    parts: Vec<Need>,
    /// Feature maps of one pass of the UNet.
    pass: f64,
    /// How many passes a step makes at most.
    passes: usize,
    /// The text as the UNet reads it, in all passes.
    text: f64,
    /// Feature maps of the decoder by extent.
    whole: f64,
    strips: f64,
    /// Of the encoder by extent; none where no picture is encoded.
    encode: [f64; 2],
    /// What threads work with, whatever they do.
    least: f64,
    pub evaluations: usize,
    pub seconds: Option<f64>,
}

#[derive(Clone, Debug)]
struct Need {
    told: PartBytes,
    weighed: Weighed,
    pinned: bool,
    /// Whether a UNet is here whose weights stay away.
    afar: bool,
    /// What is to be had beside of a network that is here, because adapters change it.
    lacks: Bytes,
    /// Which of the models that follow each other it belongs to; `None` for what all use.
    turn: Option<usize>,
}

impl Needs {
    /// Bytes of all weights.
    #[must_use]
    pub fn weights(&self) -> Bytes {
        self.parts.iter().filter(|need| need.told.part != VOCABULARIES).map(|need| need.told.bytes).sum()
    }

    /// By part.
    #[must_use]
    pub fn parts(&self) -> Vec<PartBytes> {
        self.parts.iter().map(|need| need.told.clone()).collect()
    }

    /// Feature maps of the UNet and the text.
    #[must_use]
    pub fn denoise(&self, means: MemoryPlan) -> Bytes {
        Bytes((self.text + self.pass * if means.slice { 1.0 } else { self.passes as f64 }) as u64)
    }

    /// Feature maps of the decoder, beside the text.
    #[must_use]
    pub fn decode(&self, means: MemoryPlan) -> Bytes {
        let maps = if means.decode == DecodeExtent::Strips { self.strips } else { self.whole };
        Bytes((self.text + maps) as u64)
    }

    /// The largest moment of the feature maps.
    #[must_use]
    pub fn activations(&self, means: MemoryPlan) -> Bytes {
        let [whole, strips] = self.encode;
        let encode = if means.decode == DecodeExtent::Strips { strips } else { whole };
        self.denoise(means).max(self.decode(means)).max(Bytes(encode as u64)) + Bytes(self.least as u64)
    }

    /// Bytes still to be had, less what those weights give back that leave. A refiner takes its base's place where there is
    /// no room for both.
    #[must_use]
    pub fn needed(&self, means: MemoryPlan) -> Bytes {
        let turns = self.parts.iter().filter_map(|need| need.turn).max().unwrap_or(0);
        let most = (0..=turns).map(|turn| {
            let of = |bytes: &dyn Fn(&Need) -> i64| -> i64 {
                self.parts.iter().filter(|need| need.turn.is_none_or(|own| own == turn)).map(bytes).sum()
            };
            let drawing = of(&|need| need.drawing(means)) + self.activations(means).0 as i64;
            // Where text encoders leave, what comes after them is not there yet.
            let with_vae = self.encode[0] > 0.0;
            let encoding = of(&|need| need.encoding(with_vae)) + self.least as i64;
            if means.offload == Offload::None { drawing } else { drawing.max(encoding) }
        });
        Bytes(most.max().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0))
    }

    /// The same for an image of `scale` times as many pixels.
    #[must_use]
    pub fn scaled(&self, scale: f64) -> Self {
        let Self { pass, whole, strips, encode, .. } = *self;
        let encode = encode.map(|bytes| bytes * scale);
        Self { pass: pass * scale, whole: whole * scale, strips: strips * scale, encode, ..self.clone() }
    }
}

impl Need {
    /// Adapters change a part of it: that is in memory anew, unless the changed network is here.
    fn adapt(&mut self, Touched { before, after }: Touched, is_here: bool, on_host: bool) {
        let Weighed { bytes, mapped, away, .. } = self.weighed;
        let more = if on_host { after.saturating_sub(before.away) } else { Bytes(0) };
        self.weighed.bytes = bytes + after.saturating_sub(before.bytes);
        self.weighed.away = away + more;
        self.told.bytes = self.weighed.bytes;
        if is_here || !self.told.loaded {
            self.weighed.mapped = mapped.saturating_sub(before.mapped);
            self.told.mapped = self.weighed.mapped;
        } else {
            self.lacks = self.lacks + after.saturating_sub(before.mapped);
        }
    }

    /// Bytes that were had before. A mapped file that was read is memory that counts as free.
    fn had(&self) -> i64 {
        let Weighed { bytes, mapped, .. } = self.weighed;
        if self.told.loaded { bytes.saturating_sub(mapped).0 as i64 } else { 0 }
    }

    /// What is held of a network whose weights stay away, and is free again where it goes.
    fn had_afar(&self) -> i64 {
        let Weighed { away, passing, .. } = self.weighed;
        if self.afar { away.saturating_sub(passing).0 as i64 } else { 0 }
    }

    /// Bytes still to be had while the text is encoded, before which images have been read: `with_vae` as latents.
    fn encoding(&self, with_vae: bool) -> i64 {
        let part = self.told.part;
        if [ENCODERS, CONTROLNET, ADAPTER].contains(&part) || (part == VAE && with_vae) { self.whole() } else { 0 }
    }

    /// Bytes still to be had while the image is made; below 0 where some are given back.
    fn drawing(&self, means: MemoryPlan) -> i64 {
        let away = self.weighed.away;
        let back = if self.pinned { 0 } else { self.had() };
        match (self.told.part, means.offload) {
            (ENCODERS, Offload::TextEncoders | Offload::Sequential) if !self.pinned => -back,
            (UNET, Offload::Sequential) => away.0 as i64 - self.had_afar() - back,
            // It makes place for the one that is here whole.
            (UNET, _) if !self.pinned => self.whole() - self.had_afar(),
            _ => self.whole(),
        }
    }

    /// Bytes still to be had of all of it.
    fn whole(&self) -> i64 {
        (self.weighed.bytes + self.lacks).0 as i64 - self.had()
    }
}

impl Worker<EstimateTask<'_>> for Estimation {
    type Output = Needs;

    fn run(&self, task: EstimateTask<'_>, ctx: &Context) -> Result<Needs> {
        let EstimateTask { plan, stack, holding, key, throughput, residents } = task;
        let of = |size: ImageSize| size.width * size.height / 64;
        let last = of(plan.last_size());
        let positions = of(plan.size).max(last);
        let element = holding.compute.tensor().size_in_bytes();
        // The VAE never computes in f16.
        let wide = if holding.compute == Dtype::F16 { Dtype::F32.tensor().size_in_bytes() } else { element };
        let decode = |extent| plan.checkpoint.vae.decode_bytes(64 * last, wide, extent) as f64;
        let encode = |extent| plan.checkpoint.vae.encode_bytes(64 * positions, wide, extent) as f64;
        let takes_mask = plan.checkpoint.unet.in_channels > plan.checkpoint.vae.latent_channels;
        let enlarged = plan.further.iter().any(|further| matches!(further.entry, Entry::Pixels(_)));
        let encodes = plan.editing.is_some() || takes_mask || enlarged;
        let passes = plan.guidance.all_roles().len();
        let Footprint { maps, skips, text } = plan.checkpoint.unet.footprint(positions, holding.on_host)?;
        // What ControlNets add stays while it runs, and a sum beside what is added to it.
        let added = skips * plan.controls.len().min(2) as f64;
        let runs = || {
            let further = plan.further.iter().map(|further| (&further.sampling, of(further.size)));
            std::iter::once((&plan.sampling, of(plan.size))).chain(further)
        };
        let units = runs().map(|(sampling, positions)| plan.guidance.evaluations(sampling) * positions).sum();
        let images = plan.seeds.len();
        let seconds = throughput
            .expect(key, Work::Evaluation, units)
            .zip(throughput.expect(key, Work::Decode, last))
            .map(|(denoise, decode)| (denoise + decode) * images as f64);
        Ok(Needs {
            parts: parts((plan, stack), holding, residents, ctx)?,
            pass: (maps + added) * element as f64,
            passes,
            text: text * (passes * element) as f64,
            whole: decode(Extent::Whole),
            strips: decode(Extent::Strips),
            encode: if encodes { [Extent::Whole, Extent::Strips].map(encode) } else { [0.0; 2] },
            least: if holding.on_host { WORKING.0 as f64 } else { 0.0 },
            evaluations: runs().map(|(sampling, _)| sampling.evaluations()).sum::<usize>() * images,
            seconds,
        })
    }
}

/// Every network that the plan uses, once each.
fn parts(
    (plan, stack): (&GenerationPlan, &LoraStack),
    holding: Holding,
    residents: &[Resident],
    ctx: &Context,
) -> Result<Vec<Need>> {
    let mut needs: Vec<Need> = Vec::new();
    let mut add = |part: &'static str, kind: &str, name: &str, weighed: Weighed, turn: Option<usize>| {
        let quantization = if [UNET, CONTROLNET].contains(&part) { holding.quantization } else { Quantization::None };
        // The VAE never computes in f16.
        let wide = part == VAE && holding.compute == Dtype::F16;
        let dtype = if wide { Dtype::F32 } else { holding.compute };
        let here = |away| {
            let form = form(dtype, quantization, away);
            let is = move |one: &&Resident| one.kind == kind && one.form.as_ref().is_none_or(|own| *own == form);
            let all = residents.iter().filter(is).filter(|one| one.name == name && is_of(plan, one));
            // Alone, or beneath the adapters of this request.
            let over = match part {
                UNET => stack.key(&[Part::Unet]),
                ENCODERS => stack.key(&managers::ENCODERS),
                _ => return all.into_iter().next(),
            };
            all.into_iter().find(|one| one.over.is_none() || over.is_some_and(|over| over.is(one.over)))
        };
        let resident = here(false);
        let Weighed { bytes, mapped, .. } = weighed;
        let told = PartBytes { part, name: name.to_owned(), bytes, mapped, loaded: resident.is_some() };
        let afar = part == UNET && here(true).is_some();
        let pinned = resident.is_some_and(|one| one.pinned);
        needs.push(Need { told, weighed, pinned, afar, lacks: Bytes(0), turn });
    };
    let mut models: Vec<&Checkpoint> = vec![&plan.checkpoint];
    for further in &plan.further {
        if models.iter().all(|model| model.key != further.checkpoint.key) {
            models.push(&further.checkpoint);
        }
    }
    for (turn, model) in models.into_iter().enumerate() {
        let weigh = |part| Weighed::part(model, part, holding, ctx);
        let mut encoders = weigh(Part::TextEncoder2)?;
        if model.text_encoder.is_some() {
            let first = weigh(Part::TextEncoder)?;
            encoders = Weighed {
                bytes: encoders.bytes + first.bytes,
                mapped: encoders.mapped + first.mapped,
                away: encoders.away + first.away,
                passing: encoders.passing.max(first.passing),
            };
        }
        add(ENCODERS, "encoder", &model.name, encoders, Some(turn));
        add(UNET, "unet", &model.name, weigh(Part::Unet)?, Some(turn));
        if turn == 0 {
            add(VAE, "vae", &model.name, weigh(Part::Vae)?, None);
        }
    }
    if holding.on_host {
        let weighed = Weighed { bytes: TOKENIZERS, away: TOKENIZERS, ..Weighed::default() };
        add(VOCABULARIES, "tokenizer", &plan.checkpoint.name, weighed, None);
    }
    for (at, control) in plan.controls.iter().enumerate() {
        if plan.controls.iter().position(|other| other.net.key == control.net.key) == Some(at) {
            add(
                CONTROLNET,
                "controlnet",
                &control.net.name,
                Weighed::control(&control.net, &plan.checkpoint, holding, ctx)?,
                None,
            );
        }
    }
    for lora in &plan.loras {
        add("lora", "lora", &lora.file.name, Weighed::component_file(&lora.file, holding, ctx)?, None);
    }
    for (kind, found) in plan.adapters.networks() {
        add(ADAPTER, kind, &found.name, Weighed::component_file(found, holding, ctx)?, None);
    }
    for (part, kind, networks) in [(ENCODERS, "encoder", &managers::ENCODERS[..]), (UNET, "unet", &[Part::Unet])] {
        let Some(over) = stack.key(networks) else { continue };
        let of_plan = |need: &&mut Need| need.told.part == part && need.told.name == plan.checkpoint.name;
        let Some(need) = needs.iter_mut().find(of_plan) else { continue };
        let is_here =
            |one: &Resident| one.kind == kind && one.name == need.told.name && over.is(one.over) && need.told.loaded;
        let is_here = residents.iter().any(is_here);
        for &network in networks {
            if network != Part::TextEncoder || plan.checkpoint.text_encoder.is_some() {
                need.adapt(Touched::by(stack, &plan.checkpoint, network, holding, ctx)?, is_here, holding.on_host);
            }
        }
    }
    Ok(needs)
}

#[cfg(test)]
mod tests {
    use super::{Need, Needs, PartBytes, Touched, Weighed};
    use crate::inference::interface::DecodeExtent;
    use crate::inference::plan::memory_policy::{Available, choose, next};
    use crate::inference::request::memory::{Fallback, MemoryOptions, MemoryUse, Offload};
    use crate::units::Bytes;

    /// 100 of text encoders, a UNet of 500 that takes 50 away from its device, and feature maps of 200 in two passes, 400 for
    /// whole pictures and 150 for strips.
    fn needs(loaded: bool) -> Needs {
        let need = |part: &'static str, bytes, away| {
            let weighed = Weighed { bytes: Bytes(bytes), away: Bytes(away), passing: Bytes(20), ..Weighed::default() };
            let told = PartBytes { part, name: "m".into(), bytes: Bytes(bytes), mapped: Bytes(0), loaded };
            Need { told, weighed, pinned: false, afar: false, lacks: Bytes(0), turn: Some(0) }
        };
        Needs {
            parts: vec![need("text_encoders", 100, 100), need("unet", 500, 50)],
            pass: 100.0,
            passes: 2,
            text: 0.0,
            whole: 400.0,
            strips: 150.0,
            encode: [0.0; 2],
            least: 0.0,
            evaluations: 1,
            seconds: None,
        }
    }

    fn check(options: MemoryOptions, (free, droppable): (u64, u64), fallbacks: &[Fallback], needed: u64, fits: bool) {
        let available = Available { free: Bytes(free), droppable: Bytes(droppable) };
        let choice = choose(&needs(false), options, available);
        assert_eq!(
            (choice.told.fallbacks.as_slice(), choice.needed, choice.fits),
            (fallbacks, Bytes(needed), fits),
            "{free} free"
        );
    }

    #[test]
    fn rungs_are_taken_in_their_order_as_far_as_they_help() {
        let open = MemoryOptions::default();
        check(open, (1000, 0), &[], 1000, true);
        check(open, (999, 1), &[Fallback::Drop], 1000, true);
        check(open, (998, 1), &[Fallback::Drop, Fallback::Strips], 800, true);
        check(open, (799, 0), &[Fallback::Strips, Fallback::Slice], 750, true);
        check(open, (749, 0), &[Fallback::Strips, Fallback::Slice, Fallback::TextEncoders], 650, true);
        let all = [Fallback::Strips, Fallback::Slice, Fallback::TextEncoders, Fallback::Sequential];
        check(open, (649, 0), &all, 200, true);
        check(open, (199, 0), &all, 200, false);
    }

    #[test]
    fn what_is_asked_for_is_neither_climbed_to_nor_past() {
        let whole = MemoryOptions { decode: DecodeExtent::Whole, ..MemoryOptions::default() };
        // Passes do not help where the decoder is the largest moment.
        check(whole, (900, 0), &[Fallback::TextEncoders], 900, true);
        let nothing = MemoryOptions {
            decode: DecodeExtent::Strips,
            slice: Some(false),
            offload: Offload::None,
            ..MemoryOptions::default()
        };
        check(nothing, (1, 0), &[], 800, false);
        let sequential = MemoryOptions { offload: Offload::Sequential, ..MemoryOptions::default() };
        check(sequential, (450, 0), &[], 450, true);
    }

    #[test]
    fn a_loaded_network_that_leaves_gives_its_bytes_back() {
        let away = MemoryOptions {
            decode: DecodeExtent::Strips,
            slice: Some(true),
            offload: Offload::TextEncoders,
            ..MemoryOptions::default()
        };
        assert_eq!(needs(true).needed(away.first()), Bytes(50));
        assert_eq!(needs(true).needed(MemoryOptions { offload: Offload::None, ..away }.first()), Bytes(150));
    }

    #[test]
    fn a_network_that_is_here_from_afar_is_not_here_whole() {
        let mut needs = needs(false);
        needs.parts.iter_mut().for_each(|need| need.afar = need.told.part == "unet");
        let least = MemoryOptions { decode: DecodeExtent::Strips, slice: Some(true), ..MemoryOptions::default() };
        let needed = |offload| needs.needed(MemoryOptions { offload, ..least }.first());
        // Its 30 go where it is loaded whole.
        assert_eq!((needed(Offload::None), needed(Offload::Sequential)), (Bytes(720), Bytes(170)));
    }

    #[test]
    fn images_are_read_beside_the_text_encoders() {
        let mut needs = needs(false);
        let told = PartBytes { part: "vae", ..needs.parts[0].told.clone() };
        let weighed = Weighed { bytes: Bytes(700), ..Weighed::default() };
        needs.parts.push(Need { told, weighed, pinned: false, afar: false, lacks: Bytes(0), turn: None });
        needs.encode = [1.0; 2];
        let means = MemoryOptions { offload: Offload::Sequential, ..MemoryOptions::default() }.first();
        let drawing = needs.needed(means);
        needs.parts[0].weighed.bytes = Bytes(1000);
        assert_eq!((drawing, needs.needed(means)), (Bytes(1150), Bytes(1700)));
    }

    #[test]
    fn what_adapters_change_is_had_anew_unless_it_is_here() {
        let weighed = |bytes, mapped| Weighed { bytes: Bytes(bytes), mapped: Bytes(mapped), ..Weighed::default() };
        let touched = Touched { before: weighed(120, 100), after: Bytes(240) };
        let needed = |loaded, is_here| {
            let told = PartBytes { part: "unet", name: "m".into(), bytes: Bytes(500), mapped: Bytes(400), loaded };
            let weighed = weighed(500, 400);
            let mut need = Need { told, weighed, pinned: false, afar: false, lacks: Bytes(0), turn: Some(0) };
            need.adapt(touched, is_here, true);
            need.whole()
        };
        assert_eq!((needed(false, false), needed(true, false), needed(true, true)), (620, 540, 300));
    }

    #[test]
    fn a_device_without_memory_has_every_rung_left_climbed_once() {
        let options = MemoryOptions::default();
        let mut told = MemoryUse { means: options.first(), ..MemoryUse::default() };
        while let Some((fallback, means)) = next(options, &told) {
            told.fallbacks.push(fallback);
            told.means = means;
        }
        assert_eq!(told.fallbacks, Fallback::ALL);
        assert_eq!(
            (told.means.decode, told.means.slice, told.means.offload),
            (DecodeExtent::Strips, true, Offload::Sequential)
        );
    }
}
