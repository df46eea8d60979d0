//! Answers requests of the model domain: lists, describes, loads, pins, unloads and downloads models.

use std::sync::Arc;
use std::time::Instant;

use crate::allocator;
use crate::context::Context;
use crate::device::instructor::{MemoryStatus, Placement};
use crate::device::interface::Quantization;
use crate::device::scope::{RequestScope, ScopedResources};
use crate::error::{Error, Result};
use crate::layers::{Instructor, Manager, Resident, ResidentForm};
use crate::model::catalog::Catalog;
use crate::model::checkpoint::{Checkpoint, CheckpointKey, Part};
use crate::model::hub::download::fetch;
use crate::model::hub::reference::at_revision;
use crate::model::interface::{
    ComponentFacts, EncoderPolicy, HubSettings, Inspection, Loaded, LoadedComponent, Model, ModelEntry, ModelList,
    Pinned, Request, Response, SchedulerFacts, Settings, TextEncoderFacts, UnetFacts, Unloaded, VaeFacts,
};
use crate::model::lora::LoraStack;
use crate::model::managers::{
    AdapterManager, Budget, ControlNetManager, ENCODERS, EncoderManager, ShelfKey, TokenizerManager, UnetManager,
    VaeManager,
};
use crate::model::networks::clip::ClipConfig;
use crate::units::{Allowance, Bytes};

/// Share of the memory, in percent, above which a model's weights leave too little for activations.
const CROWDED: u64 = 60;
/// Part of the memory that `cache_size` leaves free where it is `auto`: a quarter.
const LEFT_FREE: u64 = 4;

/// The managers of the model domain. `inspect` and `list` need only the catalog.
pub struct ModelResources {
    pub catalog: Catalog,
    pub tokenizers: TokenizerManager,
    pub encoders: EncoderManager,
    pub unets: UnetManager,
    pub vaes: VaeManager,
    pub controlnets: ControlNetManager,
    pub adapters: AdapterManager,
    pub text_encoders: EncoderPolicy,
    /// Where `fetch` downloads from.
    pub hub: HubSettings,
    cache_size: Allowance,
    /// The budget that all networks share.
    pub budget: Budget,
}

impl ModelResources {
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let budget = Budget::new(settings.cache_size.of(None).unwrap_or(Bytes(u64::MAX)));
        Self {
            catalog: Catalog::new(settings),
            tokenizers: TokenizerManager::default(),
            encoders: EncoderManager::new(&budget),
            unets: UnetManager::new(&budget),
            vaes: VaeManager::new(&budget),
            controlnets: ControlNetManager::new(&budget),
            adapters: AdapterManager::new(&budget),
            text_encoders: settings.text_encoders,
            hub: settings.hub.clone(),
            cache_size: settings.cache_size,
            budget,
        }
    }

    /// Everything of the model domain that is in memory.
    #[must_use]
    pub fn resident(&self) -> Vec<Resident> {
        let managers: [&dyn Manager; 6] =
            [&self.tokenizers, &self.encoders, &self.unets, &self.vaes, &self.controlnets, &self.adapters];
        managers.into_iter().flat_map(Manager::resident).collect()
    }

    /// Begins a request: sets the budget for networks that it does not use by the device's memory.
    pub fn begin(&self, memory: Option<MemoryStatus>) {
        let usable = memory.map(|memory| {
            // Mapped weights are the system's cache of the files, which it counts as available.
            let mapped = if memory.on_host { allocator::usage().mapped } else { Bytes(0) };
            memory.free + self.budget.bytes().saturating_sub(mapped)
        });
        let capacity = match (self.cache_size, memory, usable) {
            (Allowance::Auto, Some(memory), Some(usable)) => usable.saturating_sub(Bytes(memory.total.0 / LEFT_FREE)),
            (Allowance::Auto, ..) => Bytes(0),
            (limit, memory, _) => limit.of(memory.map(|memory| memory.total)).unwrap_or_default(),
        };
        self.budget.begin(capacity, usable);
    }

    /// Frees the text encoders of a checkpoint, whose prompts have been encoded, if that is the policy.
    pub fn encoded(&mut self, checkpoint: &Checkpoint) {
        let crowded =
            || self.budget.usable().is_some_and(|usable| checkpoint.file_bytes().0 > usable.0 / 100 * CROWDED);
        let release = match self.text_encoders {
            EncoderPolicy::Auto => crowded(),
            EncoderPolicy::Keep => false,
            EncoderPolicy::Release => true,
        };
        if release {
            self.dismiss(checkpoint);
        }
    }

    /// Frees the text encoders of a checkpoint, unless they are pinned.
    pub fn dismiss(&mut self, checkpoint: &Checkpoint) {
        self.encoders.shelf.remove_unpinned(checkpoint.key);
    }

    /// Marks networks of a checkpoint, or of a component file, as used by the running request: those with adapters in `over`,
    /// and those that `stack` does not change.
    pub fn claim(&mut self, key: CheckpointKey, over: &[CheckpointKey], stack: &LoraStack, placement: &Placement) {
        let Placement { compute, vae, quantization, .. } = *placement;
        let form = |dtype, quantization| ResidentForm { dtype, quantization, offloaded: false };
        let whole = form(compute, quantization);
        let bare = |parts: &[Part]| stack.key(parts).is_none();
        self.encoders.shelf.claim(key, over, bare(&ENCODERS), |own| own == form(compute, Quantization::None));
        self.unets.shelf.claim(key, over, bare(&[Part::Unet]), |own| ResidentForm { offloaded: false, ..own } == whole);
        self.vaes.shelf.claim(key, over, true, |own| own == form(vae, Quantization::None));
        self.controlnets.shelf.claim(key, over, true, |own| own == whole);
        self.adapters.claim(key);
    }

    /// Frees the UNets of a checkpoint that are not offloaded as `placement` asks, unless they are pinned.
    pub fn drop_other_form(&mut self, key: CheckpointKey, placement: &Placement) {
        let form = UnetManager::form(placement);
        self.unets.shelf.remove_form(key, ResidentForm { offloaded: !form.offloaded, ..form });
    }

    fn bytes_of(&self, checkpoint: &Checkpoint) -> Bytes {
        let key = checkpoint.key;
        [self.encoders.shelf.bytes_of(key), self.unets.shelf.bytes_of(key), self.vaes.shelf.bytes_of(key)]
            .into_iter()
            .sum()
    }

    fn pin(&mut self, checkpoint: &Checkpoint, pinned: bool) {
        self.encoders.shelf.pin(checkpoint.key, pinned);
        self.unets.shelf.pin(checkpoint.key, pinned);
        self.vaes.shelf.pin(checkpoint.key, pinned);
    }
}

pub struct ModelInstructor;

impl ModelInstructor {
    fn list(&self, session: ScopedResources<'_, ModelResources>, ctx: &Context) -> Result<ModelList> {
        let ScopedResources { resources, scope } = session;
        let resident = match scope {
            RequestScope::Compute { .. } => &resources.resident(),
            RequestScope::Query { residents } => residents,
        };
        let mut models = Vec::new();
        for listed in resources.catalog.list() {
            ctx.checkpoint()?;
            let opened = resources.catalog.checkpoint(&listed);
            let here: Vec<&Resident> =
                resident.iter().filter(|r| r.name == listed.name && r.kind != "tokenizer").collect();
            let mut loaded: Vec<&'static str> = here.iter().map(|r| r.kind).collect();
            loaded.sort_unstable();
            loaded.dedup();
            let dtype = |checkpoint: &Arc<Checkpoint>| {
                let weights = checkpoint.open(Part::Unet, ctx)?;
                let sizes = weights.tensors().map(|(_, stored)| (stored.range.end - stored.range.start, stored.dtype));
                Ok::<_, Error>(sizes.max_by_key(|(bytes, _)| *bytes).map(|(_, dtype)| dtype.name()))
            };
            let dtype = opened.as_ref().map(dtype);
            models.push(ModelEntry {
                name: listed.name,
                revision: opened.as_ref().ok().and_then(|checkpoint| checkpoint.revision.clone()),
                family: opened.as_ref().ok().map(|checkpoint| checkpoint.family.name),
                bytes: opened.as_ref().map_or(Bytes(0), |checkpoint| checkpoint.file_bytes()),
                dtype: dtype.as_ref().ok().and_then(|dtype| dtype.as_ref().ok().copied().flatten()),
                loaded,
                pinned: here.iter().any(|r| r.pinned),
                problem: match (&opened, &dtype) {
                    (Err(error), _) => Some(error.to_string()),
                    (Ok(_), Ok(Err(error))) => Some(error.to_string()),
                    (Ok(_), _) => None,
                },
            });
        }
        Ok(ModelList { models, default: resources.catalog.default_name().to_owned() })
    }

    fn inspect(&self, checkpoint: &Checkpoint, ctx: &Context) -> Result<Inspection> {
        let mut components = Vec::new();
        for part in checkpoint.parts() {
            let weights = checkpoint.open(part, ctx)?;
            let mut dtypes: Vec<_> = weights.tensors().map(|(_, stored)| stored.dtype).collect();
            dtypes.sort_unstable();
            dtypes.dedup();
            let elements = |shape: &[usize]| shape.iter().map(|&side| side as u64).product::<u64>();
            components.push(ComponentFacts {
                name: part.name(),
                files: checkpoint.file_count(part),
                tensors: weights.tensors().count(),
                parameters: weights.tensors().map(|(_, stored)| elements(&stored.shape)).sum(),
                bytes: weights.tensors().map(|(_, s)| Bytes(s.range.end - s.range.start)).sum(),
                dtypes: dtypes.into_iter().map(|dtype| dtype.name()).collect(),
            });
        }
        let encoders =
            [("text_encoder", checkpoint.text_encoder.as_ref()), ("text_encoder_2", Some(&checkpoint.text_encoder_2))];
        let facts = |(name, config): (&'static str, Option<&ClipConfig>)| {
            config.map(|config| TextEncoderFacts { name, layers: config.num_hidden_layers, width: config.hidden_size })
        };
        let scheduler = &checkpoint.scheduler;
        Ok(Inspection {
            model: checkpoint.name.clone(),
            revision: checkpoint.revision.clone(),
            family: checkpoint.family.name,
            variant: checkpoint.variant,
            pipeline: checkpoint.pipeline.clone(),
            components,
            prediction_type: scheduler.prediction_type,
            default_width: checkpoint.default_size().width,
            default_height: checkpoint.default_size().height,
            scheduler: SchedulerFacts {
                class_name: scheduler.class_name.clone(),
                timestep_spacing: scheduler.timestep_spacing.map(|spacing| spacing.name()),
                zero_terminal_snr: scheduler.rescale_betas_zero_snr.unwrap_or(false),
            },
            force_zeros_for_empty_prompt: checkpoint.force_zeros_for_empty_prompt,
            unet: UnetFacts {
                in_channels: checkpoint.unet.in_channels,
                block_channels: checkpoint.unet.block_out_channels.clone(),
                context: checkpoint.unet.context_channels(),
            },
            vae: VaeFacts {
                scaling_factor: checkpoint.vae.scaling_factor,
                latent_channels: checkpoint.vae.latent_channels,
                force_upcast: checkpoint.vae.force_upcast,
            },
            text_encoders: encoders.into_iter().filter_map(facts).collect(),
            own_tokenizers: checkpoint.own_tokenizers(),
        })
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        session: ScopedResources<'_, ModelResources>,
        ctx: &Context,
    ) -> Result<Loaded> {
        let ScopedResources { resources, scope } = session;
        let placement = scope.placement()?;
        let start = Instant::now();
        let key = |dtype| ShelfKey::new(checkpoint, placement, dtype);
        let (compute, vae) = (key(placement.compute), key(placement.vae));
        let unet = UnetManager::key(checkpoint, placement);
        let mut components = Vec::new();
        let mut add = |name, before: Option<Bytes>, after: Option<Bytes>, begun: Instant| {
            let bytes = after.unwrap_or_default();
            components.push(LoadedComponent { name, bytes, ms: millis(begun), cached: before.is_some() });
        };
        let (begun, before) = (Instant::now(), resources.encoders.shelf.bytes_at(&compute));
        resources.encoders.acquire(checkpoint, placement, ctx)?;
        add("encoder", before, resources.encoders.shelf.bytes_at(&compute), begun);
        let (begun, before) = (Instant::now(), resources.unets.shelf.bytes_at(&unet));
        resources.unets.acquire(checkpoint, placement, ctx)?;
        add("unet", before, resources.unets.shelf.bytes_at(&unet), begun);
        let (begun, before) = (Instant::now(), resources.vaes.shelf.bytes_at(&vae));
        resources.vaes.acquire(checkpoint, placement, ctx)?;
        add("vae", before, resources.vaes.shelf.bytes_at(&vae), begun);
        resources.tokenizers.acquire(checkpoint)?;
        let bytes = components.iter().map(|c| c.bytes).sum();
        Ok(Loaded { model: checkpoint.name.clone(), components, bytes, ms: millis(start) })
    }

    fn unload(&self, keys: Option<&[CheckpointKey]>, resources: &mut ModelResources) -> Unloaded {
        let names = |resources: &ModelResources| -> Vec<String> {
            resources.resident().into_iter().filter(|r| r.kind != "tokenizer").map(|r| r.name).collect()
        };
        let before = names(resources);
        let mut free = |key: Option<CheckpointKey>| -> Bytes {
            let freed = [
                resources.encoders.shelf.remove(key),
                resources.unets.shelf.remove(key),
                resources.vaes.shelf.remove(key),
                resources.controlnets.shelf.remove(key),
                resources.tokenizers.remove(key),
                if key.is_none() { resources.adapters.clear() } else { Bytes(0) },
            ];
            freed.into_iter().sum()
        };
        let freed = match keys {
            Some(keys) => keys.iter().map(|key| free(Some(*key))).sum(),
            None => free(None),
        };
        allocator::release();
        let after = names(resources);
        let mut models: Vec<String> = before.into_iter().filter(|name| !after.contains(name)).collect();
        models.sort();
        models.dedup();
        Unloaded { models, freed }
    }
}

impl Instructor for ModelInstructor {
    type Interface = Model;
    type Resources<'a> = ScopedResources<'a, ModelResources>;

    fn instruct(&self, request: Request, session: Self::Resources<'_>, ctx: &Context) -> Result<Response> {
        let ScopedResources { resources, scope } = session;
        Ok(match request {
            Request::List(_) => Response::List(self.list(scope.with(resources), ctx)?),
            Request::Inspect(options) => {
                let model = at_revision(options.model.as_deref(), options.revision.as_deref())?;
                let checkpoint = resources.catalog.resolve_with(model.as_deref(), &options.separate())?;
                Response::Inspect(Box::new(self.inspect(&checkpoint, ctx)?))
            }
            Request::Load(options) => {
                let model = at_revision(options.model.as_deref(), options.revision.as_deref())?;
                let checkpoint = resources.catalog.resolve_with(model.as_deref(), &options.separate())?;
                Response::Load(self.load(&checkpoint, scope.with(resources), ctx)?)
            }
            Request::Unload(options) => {
                let model = at_revision(options.model.as_deref(), options.revision.as_deref())?;
                let separate = options.separate();
                let has_separate = separate.iter().any(|(_, name)| name.is_some());
                let named = options.model.is_some() || has_separate;
                let find = || resources.catalog.resolve_with(model.as_deref(), &separate);
                let keys = named.then(find).transpose()?.map(|checkpoint| match has_separate {
                    true => vec![checkpoint.key],
                    false => resources.catalog.states(&checkpoint.name),
                });
                Response::Unload(self.unload(keys.as_deref(), resources))
            }
            Request::Pin(options) => {
                let checkpoint = resources
                    .catalog
                    .resolve(at_revision(options.model.as_deref(), options.revision.as_deref())?.as_deref())?;
                let pinned = options.pin.unwrap_or(true);
                if pinned {
                    self.load(&checkpoint, scope.with(resources), ctx)?;
                }
                resources.pin(&checkpoint, pinned);
                Response::Pin(Pinned { model: checkpoint.name.clone(), pinned, bytes: resources.bytes_of(&checkpoint) })
            }
            Request::Fetch(options) => Response::Fetch(fetch(&options, &resources.hub, &resources.catalog, ctx)?),
        })
    }
}

fn millis(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}
