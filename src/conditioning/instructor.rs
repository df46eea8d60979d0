//! Decides for the conditioning domain: which text goes to which encoder, and what a missing one means.
//!
//! The rules are those of diffusers' SDXL pipelines: a missing or empty second prompt is the first; a missing negative
//! prompt is zeros where the checkpoint says so; `clip_skip` is for the prompt and not for the negative prompt; a model
//! with the second encoder alone gives it the first prompt. Beyond diffusers, a prompt of more than 75 tokens is
//! encoded in chunks, whose states follow each other, and prompts have the syntax of AUTOMATIC1111's web UI.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::conditioning::hints;
use crate::conditioning::interface::{
    AppliedEmbedding, CacheCount, Conditioning as ConditioningDomain, ConditioningList, EmbeddingFacts,
    EmbeddingRequest, EncodedPrompt, PromptWeighting, Request, Response, Settings, TokenList, Tokenized,
};
use crate::conditioning::manager::{EmbeddingKey, EmbeddingManager, HintManager};
use crate::conditioning::prompt_plan::{Reading, Telling, Text, read};
use crate::conditioning::prompt_schedule::Span;
pub use crate::conditioning::prompt_schedule::{Conditioning, Positive, PromptSchedule};
use crate::conditioning::workers::encode::{Embeddings, Encode, EncodeTask, EncodeText};
use crate::conditioning::workers::prompt::{
    LONGEST, Lay, LayTask, MOST_CHUNKS, Side, Tokenize, TokenizeTask, Word, chunks, empty, stands_in,
};
use crate::conditioning::workers::syntax::unescaped;
use crate::context::{Context, Stage as Part};
use crate::device::instructor::Placement;
use crate::device::scope::ScopedResources;
use crate::error::{Error, Result, StageContext};
use crate::layers::Instructor;
use crate::model::catalog::Catalog;
use crate::model::catalog::component_file::ComponentFile;
use crate::model::checkpoint::Checkpoint;
use crate::model::instructor::ModelResources;
use crate::model::lora::LoraStack;
use crate::model::managers::{ClipTokenizer, ENCODERS, Tokenizers};
use crate::model::networks::clip::FIRST_VECTOR;
use crate::model::textual_inversion::Inversion;
use crate::postprocessing::instructor::PostprocessingInstructor;
use crate::roots::Roots;

const STAGE: &str = "text encoder";
/// Steps of a prompt that is encoded by itself.
const STEPS: usize = 25;
/// Chunks of all texts of a request together: about 600 KiB each in f32.
const MOST_TOLD: usize = 1024;
/// Texts that the encoders read in one pass.
const AT_ONCE: usize = 16;
/// Most textual inversions of a request, and the longest word for one in bytes.
const MOST_EMBEDDINGS: usize = 64;
const LONGEST_TOKEN: usize = 256;
/// What a prompt may be written with.
const SYNTAX: [&str; 9] =
    ["(word)", "[word]", "(word:1.2)", "\\(", "BREAK", "[a|b]", "[a:b:0.5]", "a AND b :1.2", "embedding"];

/// What a request says of its prompts.
#[derive(Clone, Debug, Default)]
pub struct PromptOptions {
    pub prompt: String,
    /// Of the second encoder; the first prompt if missing or empty.
    pub prompt_2: Option<String>,
    pub negative_prompt: Option<String>,
    pub negative_prompt_2: Option<String>,
    /// Layers left out before the penultimate one.
    pub clip_skip: Option<u32>,
    /// Whether the negative prompt is needed: guidance above 1.
    pub guided: bool,
    pub weighting: PromptWeighting,
    /// Steps that will be walked, which schedules divide.
    pub steps: usize,
    /// How many tokens back a comma may stand for a chunk to end there; 0: it ends where it is full.
    pub backtrack: usize,
    pub embeddings: Vec<EmbeddingChoice>,
    /// What changes the text encoders; decided and opened.
    pub adapters: Option<Arc<LoraStack>>,
    /// Samples of the UNet for one image in the largest evaluation, which [`ConditioningInstructor::check`] counts.
    pub passes: usize,
}

/// A textual inversion that was found.
#[derive(Clone, Debug)]
pub struct EmbeddingChoice {
    pub file: Arc<ComponentFile>,
    pub token: String,
}

impl EmbeddingChoice {
    /// As a request that chooses the same.
    #[must_use]
    pub fn options(&self) -> EmbeddingRequest {
        EmbeddingRequest { name: self.file.name.clone(), token: Some(self.token.clone()) }
    }
}

/// What the conditioning domain draws on.
pub struct ConditioningResources {
    pub model: ModelResources,
    pub embeddings: EmbeddingManager,
    pub hints: HintManager,
}

pub struct ConditioningInstructor {
    pub settings: Settings,
    /// Beneath which requests may name images.
    pub roots: Roots,
    /// Writes the hints that are asked for as images.
    pub delivery: PostprocessingInstructor,
}

impl ConditioningInstructor {
    /// Finds the textual inversions of a request.
    ///
    /// # Errors
    /// `invalid_parameter` for tokens that are empty, too long or the same; those of [`Catalog::component_file`].
    pub fn embeddings(&self, entries: &[EmbeddingRequest], catalog: &Catalog) -> Result<Vec<EmbeddingChoice>> {
        if entries.len() > MOST_EMBEDDINGS {
            let got = entries.len();
            return Err(Error::invalid("embeddings", format!("must be at most {MOST_EMBEDDINGS}, got {got}")));
        }
        let mut choices: Vec<EmbeddingChoice> = Vec::with_capacity(entries.len());
        for (index, EmbeddingRequest { name, token }) in entries.iter().enumerate() {
            let field = |name: &str| format!("embeddings.{index}.{name}");
            // By itself, or in a folder of embeddings beside the models.
            let mut found = catalog.find_under_roots(name, &field("name"))?;
            if found.is_none() && !name.starts_with('/') {
                found = catalog.find_under_roots(&format!("embeddings/{name}"), &field("name"))?;
            }
            let file = found.map_or_else(|| catalog.component_file(name, &field("name")), Ok)?;
            let own = name.rsplit('/').next().unwrap_or(name);
            let token = token.as_deref().unwrap_or(own.strip_suffix(".safetensors").unwrap_or(own));
            // White space would have it compared with stretches of text where it is compared with words.
            if token.is_empty() || token.contains(char::is_whitespace) || token.len() > LONGEST_TOKEN {
                let message = format!("must be a word of 1 to {LONGEST_TOKEN} bytes without white space");
                return Err(Error::invalid(field("token"), message));
            }
            if choices.iter().any(|known| known.token.to_lowercase() == token.to_lowercase()) {
                return Err(Error::invalid(field("token"), format!("`{token}` stands for an embedding already")));
            }
            choices.push(EmbeddingChoice { file: Arc::new(file), token: token.to_owned() });
        }
        Ok(choices)
    }

    /// Whether the prompts can be read, before anything is loaded. Gives the UNet's samples of one image in the largest
    /// evaluation.
    ///
    /// # Errors
    /// `invalid_parameter`, with the field and the character; for an embedding whose word stands in no prompt.
    pub fn check(&self, options: &PromptOptions, checkpoint: &Checkpoint) -> Result<usize> {
        let reading = read(options, checkpoint, zeros(options, checkpoint))?;
        let written = if options.embeddings.is_empty() { Vec::new() } else { written(options)? };
        for (index, choice) in options.embeddings.iter().enumerate() {
            if !written.iter().any(|text| stands_in(text, &choice.token)) {
                let message = format!("`{}` stands in none of the prompts", choice.token);
                return Err(Error::invalid(format!("embeddings.{index}.token"), message));
            }
        }
        let parts = reading.tellings.iter().map(|telling| telling.positive.len()).max().unwrap_or(1);
        Ok(parts + usize::from(options.guided || parts > 1))
    }

    /// The embeddings of a request's prompts, in the placement's compute dtype. All have the same number of tokens.
    ///
    /// # Errors
    /// `invalid_parameter` for a prompt that is too long or cannot be read, or a `clip_skip` beyond the encoders' layers;
    /// those of loading; those of the device.
    pub fn condition(
        &self,
        options: &PromptOptions,
        checkpoint: &Checkpoint,
        resources: &mut ConditioningResources,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<PromptSchedule> {
        let zeros = zeros(options, checkpoint);
        if zeros && options.guided && options.negative_prompt_2.is_some() {
            ctx.warn("`negative_prompt_2` has no effect without `negative_prompt`");
        }
        let Reading { texts, tellings } = read(options, checkpoint, zeros)?;
        let positions = positions(checkpoint)?;
        let inversions = Inversions::read(options, checkpoint, placement, ctx)?;
        let tokenizers = resources.model.tokenizers.acquire(checkpoint)?;
        let laid = |text| lay(text, &tokenizers, &inversions.words, (positions, options.backtrack), ctx);
        let mut encoded = texts.iter().map(laid).collect::<Result<Vec<EncodeText>>>()?;
        let count = encoded.iter().flat_map(|text| &text.sides).map(|side| side.rows.len()).max().unwrap_or(1);
        if encoded.len() * count > MOST_TOLD {
            let (texts, most) = (encoded.len(), MOST_TOLD / count);
            let message = format!(
                "and the other prompts together must be at most {most} texts of {count} chunks from step to step, got {texts}"
            );
            return Err(Error::invalid("prompt", message));
        }
        for EncodeText { sides: [first, second] } in &mut encoded {
            if let Some(tokenizer) = &tokenizers.first {
                first.fill(count, tokenizer, positions);
            }
            second.fill(count, &tokenizers.second, positions);
        }

        let unchanged = LoraStack::default();
        let stack = options.adapters.as_deref().unwrap_or(&unchanged);
        let adapters = stack.key(&ENCODERS);
        let key = |(text, encoded): (&Text, &EncodeText)| {
            let weighted = encoded.sides.iter().any(Side::is_weighted);
            let mut ids = encoded.sides.iter().flat_map(|side| &side.rows).flat_map(|row| &row.ids);
            let vectors = ids.any(|&id| id >= FIRST_VECTOR);
            EmbeddingKey {
                checkpoint: checkpoint.key,
                dtype: placement.compute,
                device: placement.name.clone(),
                adapters,
                text: encoded.clone(),
                skip: text.skip,
                weighting: if weighted { options.weighting } else { PromptWeighting::None },
                embeddings: if vectors {
                    options.embeddings.iter().map(|choice| choice.file.key).collect()
                } else {
                    Vec::new()
                },
            }
        };
        let keys: Vec<EmbeddingKey> = texts.iter().zip(&encoded).map(key).collect();
        let cached = |key: &EmbeddingKey| resources.embeddings.get(key).filter(|_| self.settings.cache_embeddings);
        let mut embeddings: Vec<Option<Embeddings>> = keys.iter().map(cached).collect();
        let hits = embeddings.iter().flatten().count();
        let cache = CacheCount { hits, misses: texts.len() - hits };

        if cache.misses > 0 {
            let encoders = resources.model.encoders.adapted(checkpoint, stack, placement, ctx)?;
            let first = tokenizers.first.as_ref().map(|tokenizer| empty(tokenizer, positions));
            let empties = [first.unwrap_or_default(), empty(&tokenizers.second, positions)];
            ctx.stage(Part::Encode, || {
                // Texts that leave out the same layers share one pass.
                let skips: BTreeSet<usize> = texts.iter().map(|text| text.skip).collect();
                for skip in skips {
                    let wanted = |&at: &usize| embeddings[at].is_none() && texts[at].skip == skip;
                    let places: Vec<usize> = (0..texts.len()).filter(wanted).collect();
                    for places in places.chunks(AT_ONCE) {
                        let texts: Vec<&EncodeText> = places.iter().map(|&at| &encoded[at]).collect();
                        let task = EncodeTask {
                            encoders: &encoders,
                            device: &placement.device,
                            texts: &texts,
                            skip,
                            weighting: options.weighting,
                            empty: &empties,
                            vectors: &inversions.vectors,
                        };
                        for (&at, made) in places.iter().zip(ctx.perform(&Encode, task)?) {
                            embeddings[at] = Some(made);
                        }
                    }
                }
                Ok(())
            })?;
            drop(encoders);
            resources.model.encoded(checkpoint);
            if self.settings.cache_embeddings {
                for (key, made) in keys.into_iter().zip(embeddings.iter().flatten()) {
                    if resources.embeddings.get(&key).is_none() {
                        resources.embeddings.insert(key, made);
                    }
                }
            }
        }
        let made: Vec<Embeddings> = embeddings.into_iter().flatten().collect();
        script(&tellings, &made, zeros && options.guided).map(|(told, spans)| PromptSchedule {
            told,
            spans,
            applied: inversions.applied,
            cache,
        })
    }
}

/// Whether no negative prompt means zeros.
fn zeros(options: &PromptOptions, checkpoint: &Checkpoint) -> bool {
    options.negative_prompt.is_none() && checkpoint.force_zeros_for_empty_prompt
}

/// The four prompts as they are written, and those with escapes without them too. A word counts as standing there whether
/// or not it is ever told, as that depends on the guidance and the steps.
fn written(options: &PromptOptions) -> Result<Vec<String>> {
    let others = [
        ("prompt_2", &options.prompt_2),
        ("negative_prompt", &options.negative_prompt),
        ("negative_prompt_2", &options.negative_prompt_2),
    ];
    let others = others.into_iter().filter_map(|(field, text)| Some((field, text.as_ref()?)));
    let mut all = Vec::new();
    for (field, text) in others.chain([("prompt", &options.prompt)]) {
        if text.len() > LONGEST {
            return Err(Error::invalid(field, format!("must be at most {LONGEST} bytes, got {}", text.len())));
        }
        all.push(text.clone());
        if text.contains('\\') {
            all.push(unescaped(text));
        }
    }
    Ok(all)
}

/// What is told, once each, and when. Without a text for the negative prompt it is zeros, where `zeros` says so or where
/// there are parts.
fn script(tellings: &[Telling], made: &[Embeddings], zeros: bool) -> Result<(Vec<Conditioning>, Vec<Span>)> {
    let text = |place: usize| made.get(place).cloned().ok_or_else(|| Error::bug("a prompt was not encoded"));
    let (mut told, mut spans) = (Vec::new(), Vec::new());
    let mut known: Vec<&Telling> = Vec::new();
    for telling in tellings {
        let same = |other: &&Telling| other.positive == telling.positive && other.negative == telling.negative;
        let place = match known.iter().position(same) {
            Some(place) => place,
            None => {
                let part = |&(place, weight): &(usize, f64)| Ok(Positive { embeddings: text(place)?, weight });
                let positive = telling.positive.iter().map(part).collect::<Result<Vec<_>>>()?;
                let negative = match (telling.negative, positive.first()) {
                    (Some(place), _) => Some(text(place)?),
                    (None, Some(first)) if zeros || positive.len() > 1 => Some(first.embeddings.zeros()?),
                    (None, _) => None,
                };
                known.push(telling);
                told.push(Conditioning { positive, negative });
                told.len() - 1
            }
        };
        spans.push(Span { until: telling.until, told: place });
    }
    Ok((told, spans))
}

/// The textual inversions of a request, read.
struct Inversions {
    words: Vec<Word>,
    /// For each encoder, of all of them.
    vectors: [Option<Tensor>; 2],
    applied: Vec<AppliedEmbedding>,
}

impl Inversions {
    fn read(options: &PromptOptions, checkpoint: &Checkpoint, placement: &Placement, ctx: &Context) -> Result<Self> {
        let (mut words, mut applied, mut next) = (Vec::new(), Vec::new(), FIRST_VECTOR);
        let (mut firsts, mut seconds) = (Vec::new(), Vec::new());
        for EmbeddingChoice { file, token } in &options.embeddings {
            let Inversion { first, second, count } = Inversion::read(file, checkpoint, &placement.device, ctx)?;
            let names = first.as_ref().map(|_| "text_encoder").into_iter().chain(["text_encoder_2"]);
            applied.push(AppliedEmbedding {
                name: file.name.clone(),
                token: token.clone(),
                vectors: count,
                encoders: names.collect(),
            });
            words.push(Word { token: token.clone(), first: next, count });
            next += u32::try_from(count).unwrap_or(0);
            firsts.extend(first);
            seconds.push(second);
        }
        let joined =
            |all: &[Tensor]| if all.is_empty() { Ok(None) } else { Tensor::cat(all, 0).map(Some).stage(STAGE) };
        Ok(Self { words, vectors: [joined(&firsts)?, joined(&seconds)?], applied })
    }
}

impl Instructor for ConditioningInstructor {
    type Interface = ConditioningDomain;
    type Resources<'a> = ScopedResources<'a, ConditioningResources>;

    fn instruct(&self, request: Request, session: Self::Resources<'_>, ctx: &Context) -> Result<Response> {
        let ScopedResources { resources, scope } = session;
        match request {
            Request::List(_) => Ok(Response::List(ConditioningList {
                prompt_syntax: SYNTAX.to_vec(),
                prompt_weightings: vec![
                    PromptWeighting::A1111,
                    PromptWeighting::Compel,
                    PromptWeighting::Comfy,
                    PromptWeighting::None,
                ],
                preprocessors: hints::list(),
                max_tokens: MOST_CHUNKS * 75,
            })),
            Request::Preprocess(options) => self.preprocess(&options, ctx).map(Response::Preprocess),
            Request::Tokenize(options) => {
                let checkpoint = resources.model.catalog.resolve(options.model.as_deref())?;
                let positions = positions(&checkpoint)?;
                let tokenizers = resources.model.tokenizers.acquire(&checkpoint)?;
                let first = tokenizers.first.as_ref().map(|first| ("tokenizer", first));
                let list = |(name, tokenizer): (&'static str, &ClipTokenizer)| {
                    let tokens =
                        ctx.perform(&Tokenize, TokenizeTask { tokenizer, text: &options.text, field: "text" })?;
                    let chunks = chunks(tokens.len(), positions);
                    let ids = tokens.iter().map(|token| token.id).collect();
                    let count = tokens.len();
                    Ok(TokenList { name, ids, tokens: tokens.into_iter().map(|t| t.text).collect(), count, chunks })
                };
                let both = first.into_iter().chain([("tokenizer_2", &tokenizers.second)]);
                let tokenizers = both.map(list).collect::<Result<_>>()?;
                Ok(Response::Tokenize(Tokenized { model: checkpoint.name.clone(), tokenizers }))
            }
            Request::EncodePrompt(options) => {
                let checkpoint = resources.model.catalog.resolve(options.model.as_deref())?;
                let placement = scope.placement()?;
                let embeddings = options.embeddings.as_deref().unwrap_or_default();
                let embeddings = self.embeddings(embeddings, &resources.model.catalog)?;
                let mut options = PromptOptions {
                    prompt: options.prompt,
                    prompt_2: options.prompt_2,
                    negative_prompt: options.negative_prompt,
                    negative_prompt_2: options.negative_prompt_2,
                    clip_skip: options.clip_skip,
                    guided: true,
                    weighting: options.prompt_weighting.unwrap_or_default(),
                    steps: STEPS,
                    backtrack: 0,
                    embeddings,
                    passes: 0,
                    adapters: None,
                };
                options.passes = self.check(&options, &checkpoint)?;
                let made = self.condition(&options, &checkpoint, resources, placement, ctx)?;
                let told = made.told.into_iter().next().ok_or_else(|| Error::bug("a prompt was not encoded"))?;
                let first = told.positive.into_iter().next().ok_or_else(|| Error::bug("a prompt was not encoded"))?;
                let negative = told.negative.ok_or_else(|| Error::bug("a negative prompt was not encoded"))?;
                let dtype = placement.compute.name();
                Ok(Response::EncodePrompt(EncodedPrompt {
                    model: checkpoint.name.clone(),
                    positive: facts(&first.embeddings, dtype)?,
                    negative: facts(&negative, dtype)?,
                }))
            }
        }
    }
}

/// Positions of the shorter encoder.
fn positions(checkpoint: &Checkpoint) -> Result<usize> {
    let both = checkpoint.text_encoder.iter().chain([&checkpoint.text_encoder_2]);
    let least = both.map(|config| config.max_position_embeddings).min().unwrap_or(0);
    if least < 3 {
        let message = format!("its text encoders have {least} positions, and a text needs 3 at least");
        return Err(Error::ModelUnsupported { name: checkpoint.name.clone(), message });
    }
    Ok(least.min(77))
}

/// A text in chunks for both encoders; nothing for the first where there is none.
fn lay(
    text: &Text,
    tokenizers: &Tokenizers,
    words: &[Word],
    (positions, backtrack): (usize, usize),
    ctx: &Context,
) -> Result<EncodeText> {
    let one = |tokenizer: &ClipTokenizer, place: usize| {
        let (fragments, field) = (&text.fragments[place], text.fields[place]);
        ctx.perform(&Lay, LayTask { tokenizer, fragments, words, positions, backtrack, field })
    };
    let first = tokenizers.first.as_ref().map(|tokenizer| one(tokenizer, 0)).transpose()?;
    Ok(EncodeText { sides: [first.unwrap_or_default(), one(&tokenizers.second, 1)?] })
}

fn facts(embeddings: &Embeddings, dtype: &'static str) -> Result<EmbeddingFacts> {
    let statistics = |tensor: &Tensor| -> Result<(f64, f64)> {
        let values = || tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let values = values().stage(STAGE)?;
        let count = values.len().max(1) as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / count;
        Ok((mean, variance.sqrt()))
    };
    let (context_mean, context_std) = statistics(&embeddings.context)?;
    let (pooled_mean, pooled_std) = statistics(&embeddings.pooled)?;
    Ok(EmbeddingFacts {
        context_shape: embeddings.context.dims().to_vec(),
        context_mean,
        context_std,
        pooled_shape: embeddings.pooled.dims().to_vec(),
        pooled_mean,
        pooled_std,
        dtype,
    })
}
