//! Answers the conditioning operations, and decides which text goes to which encoder.
//!
//! The rules are diffusers' for SDXL pipelines: a missing or empty second prompt is the first; a missing negative prompt is
//! zeros if the checkpoint says so; `clip_skip` applies to the prompt but not to the negative prompt; a model with only
//! the second encoder gives it the first prompt. Beyond diffusers, a prompt of more than 75 tokens is encoded in chunks
//! whose states are concatenated, and prompts have AUTOMATIC1111's syntax.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::conditioning::hints::{self, Hint, HintOptions, HintPlan, HintTarget};
use crate::conditioning::interface::{
    Conditioning, ConditioningList, EmbeddingFacts, EmbeddingRequest, EncodeRequest, EncodedPrompt, PreprocessRequest,
    PreprocessedImage, PromptWeighting, Request, Response, Settings, TokenList, TokenizeRequest, Tokenized,
};
use crate::conditioning::manager::{ConditioningResources, HintKey};
use crate::conditioning::prompt_encoding::{EncodedTexts, PromptEncoding, positions};
use crate::conditioning::prompt_options::{EmbeddingChoice, PromptOptions};
use crate::conditioning::prompt_plan::PromptPlan;
use crate::conditioning::prompt_schedule::{PromptSchedule, schedule};
use crate::conditioning::workers::encode::Embeddings;
use crate::conditioning::workers::prompt_attention::unescaped;
use crate::conditioning::workers::prompt_chunks::{
    MAX_CHUNKS, Tokenize, TokenizeTask, check_length, chunk_count, contains_word,
};
use crate::context::{Context, Stage as ContextStage};
use crate::device::instructor::Placement;
use crate::device::scope::ScopedResources;
use crate::error::{Error, Result, StageContext};
use crate::layers::Instructor;
use crate::model::catalog::Catalog;
use crate::model::checkpoint::Checkpoint;
use crate::model::managers::ClipTokenizer;
use crate::postprocessing::instructor::{Delivery, PostprocessingInstructor};
use crate::roots::Roots;
use crate::units::ImageSize;

/// Number of steps for `encode_prompt`.
const STEPS: usize = 25;
/// Most textual inversions of a request, and most bytes of the word for one.
const MAX_EMBEDDINGS: usize = 64;
const MAX_TOKEN_BYTES: usize = 256;
/// Longest side of a hint made by `preprocess`.
const MAX_SIDE: usize = 8192;
/// The prompt syntax that `list` reports.
const SYNTAX: [&str; 9] =
    ["(word)", "[word]", "(word:1.2)", "\\(", "BREAK", "[a|b]", "[a:b:0.5]", "a AND b :1.2", "embedding"];

pub struct ConditioningInstructor {
    pub settings: Settings,
    /// Folders that requests may read images from.
    pub roots: Roots,
    /// Writes the images of `preprocess`.
    pub delivery: PostprocessingInstructor,
}

impl ConditioningInstructor {
    /// Finds the files of a request's textual inversions.
    ///
    /// # Errors
    /// `invalid_parameter` for tokens that are empty, too long or given twice; those of [`Catalog::component_file`].
    pub fn embeddings(&self, entries: &[EmbeddingRequest], catalog: &Catalog) -> Result<Vec<EmbeddingChoice>> {
        if entries.len() > MAX_EMBEDDINGS {
            let got = entries.len();
            return Err(Error::invalid("embeddings", format!("must be at most {MAX_EMBEDDINGS}, got {got}")));
        }
        let mut choices: Vec<EmbeddingChoice> = Vec::with_capacity(entries.len());
        for (index, EmbeddingRequest { name, token }) in entries.iter().enumerate() {
            let field = |name: &str| format!("embeddings.{index}.{name}");
            let mut found = catalog.find_under_roots(name, &field("name"))?;
            if found.is_none() && !name.starts_with('/') {
                found = catalog.find_under_roots(&format!("embeddings/{name}"), &field("name"))?;
            }
            let file = found.map_or_else(|| catalog.component_file(name, &field("name")), Ok)?;
            let file_name = name.rsplit('/').next().unwrap_or(name);
            let stem = file_name.strip_suffix(".safetensors").unwrap_or(file_name);
            let token = token.as_deref().unwrap_or(stem);
            // A token is compared with single words.
            if token.is_empty() || token.contains(char::is_whitespace) || token.len() > MAX_TOKEN_BYTES {
                let message = format!("must be a word of 1 to {MAX_TOKEN_BYTES} bytes without white space");
                return Err(Error::invalid(field("token"), message));
            }
            if choices.iter().any(|known| known.token.to_lowercase() == token.to_lowercase()) {
                return Err(Error::invalid(field("token"), format!("`{token}` stands for an embedding already")));
            }
            choices.push(EmbeddingChoice { file: Arc::new(file), token: token.to_owned() });
        }
        Ok(choices)
    }

    /// Checks the prompts before anything is loaded, and counts the UNet samples of one image in the largest evaluation.
    ///
    /// # Errors
    /// `invalid_parameter`, with the field and the character; also for an embedding that no prompt uses.
    pub fn check(&self, options: &PromptOptions, checkpoint: &Checkpoint) -> Result<usize> {
        let plan = PromptPlan::new(options, checkpoint, zeros(options, checkpoint))?;
        let texts = if options.embeddings.is_empty() { Vec::new() } else { plain_texts(options)? };
        for (index, choice) in options.embeddings.iter().enumerate() {
            if !texts.iter().any(|text| contains_word(text, &choice.token)) {
                let message = format!("`{}` stands in none of the prompts", choice.token);
                return Err(Error::invalid(format!("embeddings.{index}.token"), message));
            }
        }
        let subprompts = plan.max_subprompts();
        Ok(subprompts + usize::from(options.guided || subprompts > 1))
    }

    /// The embeddings of a request's prompts, in the placement's compute dtype. All have the same number of tokens.
    ///
    /// # Errors
    /// `invalid_parameter` for faulty syntax, prompts that are too long or a `clip_skip` beyond the encoders' layers;
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
        let plan = PromptPlan::new(options, checkpoint, zeros)?;
        let cached = self.settings.cache_embeddings;
        let encoding = PromptEncoding { options, plan: &plan, checkpoint, placement, cached };
        let EncodedTexts { embeddings, applied, cache } = encoding.run(resources, ctx)?;
        let (conditionings, spans) = schedule(&plan, &embeddings, zeros && options.guided)?;
        Ok(PromptSchedule { conditionings, spans, applied, cache })
    }

    /// Reads a hint's image without decoding it, and decides what the options leave open.
    ///
    /// # Errors
    /// `unknown_name`, `invalid_parameter`, and those of reading the image.
    pub fn plan_hint(&self, options: &HintOptions) -> Result<HintPlan> {
        HintPlan::new(options, &self.roots)
    }

    /// The hint of a plan, from the cache or made.
    ///
    /// # Errors
    /// `image_decode_failed`, `cancelled`, `deadline_exceeded`.
    pub fn hint(
        &self,
        plan: &HintPlan,
        target: HintTarget,
        resources: &mut ConditioningResources,
        ctx: &Context,
    ) -> Result<Hint> {
        ctx.stage(ContextStage::Encode, || {
            let hints = &mut resources.hints;
            let key = HintKey::new(hints.fingerprint(&plan.image.bytes), plan, target);
            if let Some(image) = hints.get(&key).filter(|_| self.settings.cache_hints) {
                return Ok(Hint { image, cached: true });
            }
            let image = Arc::new(plan.make(target, ctx)?);
            if self.settings.cache_hints {
                hints.insert(key, &image);
            }
            Ok(Hint { image, cached: false })
        })
    }

    fn list() -> ConditioningList {
        ConditioningList {
            prompt_syntax: SYNTAX.to_vec(),
            prompt_weightings: vec![
                PromptWeighting::A1111,
                PromptWeighting::Compel,
                PromptWeighting::Comfy,
                PromptWeighting::None,
            ],
            preprocessors: hints::list(),
            max_tokens: MAX_CHUNKS * 75,
        }
    }

    /// Makes a hint and writes it. It is not cached, because this does not run on the thread that has the cache.
    fn preprocess(&self, options: &PreprocessRequest, ctx: &Context) -> Result<PreprocessedImage> {
        let plan = self.plan_hint(&HintOptions {
            image: &options.image,
            preprocessor: Some(&options.preprocessor),
            parameters: &options.parameters.unwrap_or_default(),
            resize: options.resize_mode.unwrap_or_default(),
            fields: ["image", "preprocessor", "parameters"],
        })?;
        let side = |field: &str, requested: Option<i64>, own: usize| match requested {
            None => Ok(own),
            Some(side) => usize::try_from(side)
                .ok()
                .filter(|side| (1..=MAX_SIDE).contains(side))
                .ok_or_else(|| Error::invalid(field, format!("must be 1 to {MAX_SIDE}, got {side}"))),
        };
        let size = ImageSize {
            width: side("width", options.width, plan.image.width)?,
            height: side("height", options.height, plan.image.height)?,
        };
        let output = self.delivery.resolve(&options.output.clone().unwrap_or_default())?;
        let image = ctx.stage(ContextStage::Encode, || plan.make(HintTarget { size, cut: None }, ctx))?;
        let delivery = Delivery { plan: &output, image: &image, index: 0, text: None };
        let delivered = ctx.stage(ContextStage::Write, || self.delivery.deliver(delivery, ctx))?;
        Ok(PreprocessedImage {
            path: delivered.path,
            base64: delivered.base64,
            format: output.format.name,
            width: image.width,
            height: image.height,
            preprocessor: plan.preprocessor,
            parameters: plan.parameters,
        })
    }

    fn tokenize(
        &self,
        request: &TokenizeRequest,
        resources: &mut ConditioningResources,
        ctx: &Context,
    ) -> Result<Tokenized> {
        let checkpoint = resources.model.catalog.resolve(request.model.as_deref())?;
        let positions = positions(&checkpoint)?;
        let tokenizers = resources.model.tokenizers.acquire(&checkpoint)?;
        let list = |(name, tokenizer): (&'static str, &ClipTokenizer)| {
            let tokens = ctx.perform(&Tokenize, TokenizeTask { tokenizer, text: &request.text, field: "text" })?;
            Ok(TokenList {
                name,
                chunks: chunk_count(tokens.len(), positions),
                count: tokens.len(),
                ids: tokens.iter().map(|token| token.id).collect(),
                tokens: tokens.into_iter().map(|token| token.text).collect(),
            })
        };
        let first = tokenizers.first.as_ref().map(|first| ("tokenizer", first));
        let both = first.into_iter().chain([("tokenizer_2", &tokenizers.second)]);
        let tokenizers = both.map(list).collect::<Result<_>>()?;
        Ok(Tokenized { model: checkpoint.name.clone(), tokenizers })
    }

    fn encode_prompt(
        &self,
        request: EncodeRequest,
        placement: &Placement,
        resources: &mut ConditioningResources,
        ctx: &Context,
    ) -> Result<EncodedPrompt> {
        let checkpoint = resources.model.catalog.resolve(request.model.as_deref())?;
        let embeddings = request.embeddings.as_deref().unwrap_or_default();
        let embeddings = self.embeddings(embeddings, &resources.model.catalog)?;
        let mut options = PromptOptions {
            prompt: request.prompt,
            prompt_2: request.prompt_2,
            negative_prompt: request.negative_prompt,
            negative_prompt_2: request.negative_prompt_2,
            clip_skip: request.clip_skip,
            guided: true,
            weighting: request.prompt_weighting.unwrap_or_default(),
            steps: STEPS,
            embeddings,
            ..PromptOptions::default()
        };
        options.passes = self.check(&options, &checkpoint)?;
        let schedule = self.condition(&options, &checkpoint, resources, placement, ctx)?;
        let not_encoded = || Error::bug("a prompt was not encoded");
        let first = schedule.conditionings.into_iter().next().ok_or_else(not_encoded)?;
        let positive = first.positive.into_iter().next().ok_or_else(not_encoded)?;
        let negative = first.negative.ok_or_else(not_encoded)?;
        let dtype = placement.compute.name();
        Ok(EncodedPrompt {
            model: checkpoint.name.clone(),
            positive: facts(&positive.embeddings, dtype)?,
            negative: facts(&negative, dtype)?,
        })
    }
}

impl Instructor for ConditioningInstructor {
    type Interface = Conditioning;
    type Resources<'a> = ScopedResources<'a, ConditioningResources>;

    fn instruct(&self, request: Request, session: Self::Resources<'_>, ctx: &Context) -> Result<Response> {
        let ScopedResources { resources, scope } = session;
        match request {
            Request::List(_) => Ok(Response::List(Self::list())),
            Request::Preprocess(request) => self.preprocess(&request, ctx).map(Response::Preprocess),
            Request::Tokenize(request) => self.tokenize(&request, resources, ctx).map(Response::Tokenize),
            Request::EncodePrompt(request) => {
                self.encode_prompt(request, scope.placement()?, resources, ctx).map(Response::EncodePrompt)
            }
        }
    }
}

/// True if a missing negative prompt means zeros.
fn zeros(options: &PromptOptions, checkpoint: &Checkpoint) -> bool {
    options.negative_prompt.is_none() && checkpoint.force_zeros_for_empty_prompt
}

/// The four prompts as given, and again without escapes. Unused negative prompts count too, because guidance and steps
/// decide whether they are used.
fn plain_texts(options: &PromptOptions) -> Result<Vec<String>> {
    let others = [
        ("prompt_2", &options.prompt_2),
        ("negative_prompt", &options.negative_prompt),
        ("negative_prompt_2", &options.negative_prompt_2),
    ];
    let others = others.into_iter().filter_map(|(field, text)| Some((field, text.as_ref()?)));
    let mut texts = Vec::new();
    for (field, text) in others.chain([("prompt", &options.prompt)]) {
        check_length(text, field)?;
        texts.push(text.clone());
        if text.contains('\\') {
            texts.push(unescaped(text));
        }
    }
    Ok(texts)
}

fn facts(embeddings: &Embeddings, dtype: &'static str) -> Result<EmbeddingFacts> {
    let statistics = |tensor: &Tensor| -> Result<(f64, f64)> {
        let values = || tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let values = values().stage("text encoder")?;
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
