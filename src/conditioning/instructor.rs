//! Decides for the conditioning domain: which text goes to which encoder, and what a missing one means.
//!
//! The rules are those of diffusers' SDXL pipelines: a missing or empty second prompt is the first; a missing negative
//! prompt is zeros where the checkpoint says so; `clip_skip` is for the prompt and not for the negative prompt; a model
//! with the second encoder alone gives it the first prompt. Beyond diffusers, a prompt of more than 75 tokens is
//! encoded in chunks, whose states follow each other.

use candle_core::{DType, Tensor};

use super::hints;
use super::interface::{
    Conditioning as ConditioningDomain, ConditioningList, EmbeddingFacts, EncodedPrompt, Request, Response, Settings,
    TokenList, Tokenized,
};
use super::manager::{EmbeddingKey, EmbeddingManager, HintManager};
use super::workers::encode::{Embeddings, Encode, EncodeTask, EncodeText};
use super::workers::prompt::{MOST_CHUNKS, Tokenize, TokenizeTask, chunks, rows};
use crate::context::{Context, Stage as Part};
use crate::device::instructor::Placement;
use crate::error::{Error, Result, Stage};
use crate::layers::Instructor;
use crate::model::checkpoint::Checkpoint;
use crate::model::instructor::ModelCrew;
use crate::model::managers::{ClipTokenizer, Token, Tokenizers};
use crate::postprocessing::instructor::PostprocessingInstructor;
use crate::roots::Roots;

const STAGE: &str = "text encoder";

/// What a request says of its prompts.
#[derive(Clone, Debug, Default)]
pub struct PromptWish {
    pub prompt: String,
    /// Of the second encoder; the first prompt if missing or empty.
    pub prompt_2: Option<String>,
    pub negative_prompt: Option<String>,
    pub negative_prompt_2: Option<String>,
    /// Layers left out before the penultimate one.
    pub clip_skip: Option<u32>,
    /// Whether the negative prompt is needed: guidance above 1.
    pub guided: bool,
}

/// What the UNet is told.
#[derive(Clone, Debug)]
pub struct Conditioning {
    pub positive: Embeddings,
    /// `None` without guidance.
    pub negative: Option<Embeddings>,
}

/// What the conditioning domain draws on.
pub struct ConditioningCrew {
    pub model: ModelCrew,
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

/// One text for both encoders, decided.
struct Text {
    texts: [String; 2],
    fields: [&'static str; 2],
    skip: usize,
}

impl ConditioningInstructor {
    /// The embeddings of a request's prompts, in the placement's compute dtype. Both have the same number of tokens.
    ///
    /// # Errors
    /// `invalid_parameter` for a prompt that is too long or a `clip_skip` beyond the encoders' layers; those of loading;
    /// those of the device.
    pub fn condition(
        &self,
        wish: &PromptWish,
        checkpoint: &Checkpoint,
        crew: &mut ConditioningCrew,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Conditioning> {
        let zeros = wish.negative_prompt.is_none() && checkpoint.force_zeros_for_empty_prompt;
        if zeros && wish.guided && wish.negative_prompt_2.is_some() {
            ctx.warn("`negative_prompt_2` has no effect without `negative_prompt`");
        }
        let mut texts = vec![positive(wish, checkpoint)];
        if wish.guided && !zeros {
            texts.push(negative(wish, checkpoint));
        }
        let positions = positions(checkpoint)?;
        let tokenizers = crew.model.tokenizers.acquire(checkpoint)?;
        let tokens = texts.iter().map(|text| tokenize(text, &tokenizers, ctx)).collect::<Result<Vec<_>>>()?;
        let count = tokens.iter().flatten().map(|tokens| chunks(tokens.len(), positions)).max().unwrap_or(1);

        let keys: Vec<EmbeddingKey> = texts
            .iter()
            .map(|text| EmbeddingKey {
                checkpoint: checkpoint.key,
                dtype: placement.compute,
                device: placement.name.clone(),
                texts: text.texts.clone(),
                skip: text.skip,
                chunks: count,
            })
            .collect();
        let cached = |key: &EmbeddingKey| crew.embeddings.get(key).filter(|_| self.settings.cache_embeddings);
        let mut embeddings: Vec<Option<Embeddings>> = keys.iter().map(cached).collect();

        if embeddings.iter().any(Option::is_none) {
            let encoders = crew.model.encoders.acquire(checkpoint, placement, ctx)?;
            ctx.stage(Part::Encode, || {
                // Texts that leave out the same layers share one pass.
                let mut skips: Vec<usize> = texts.iter().map(|text| text.skip).collect();
                skips.dedup();
                for skip in skips {
                    let wanted = |&at: &usize| embeddings[at].is_none() && texts[at].skip == skip;
                    let places: Vec<usize> = (0..texts.len()).filter(wanted).collect();
                    if places.is_empty() {
                        continue;
                    }
                    let task = |&at: &usize| rows_of(&tokens[at], &tokenizers, count, positions);
                    let rows: Vec<EncodeText> = places.iter().map(task).collect();
                    let device = &placement.device;
                    let task = EncodeTask { encoders: &encoders, device, texts: &rows, skip };
                    for (at, made) in places.into_iter().zip(ctx.perform(&Encode, task)?) {
                        embeddings[at] = Some(made);
                    }
                }
                Ok(())
            })?;
            drop(encoders);
            crew.model.encoded(checkpoint, placement);
            if self.settings.cache_embeddings {
                for (key, made) in keys.into_iter().zip(embeddings.iter().flatten()) {
                    if crew.embeddings.get(&key).is_none() {
                        crew.embeddings.insert(key, made);
                    }
                }
            }
        }
        let mut made = embeddings.into_iter().flatten();
        let positive = made.next().ok_or_else(|| Error::bug("a prompt was not encoded"))?;
        let negative = match (wish.guided, zeros) {
            (false, _) => None,
            (true, true) => Some(positive.zeros()?),
            (true, false) => Some(made.next().ok_or_else(|| Error::bug("a negative prompt was not encoded"))?),
        };
        Ok(Conditioning { positive, negative })
    }
}

impl Instructor for ConditioningInstructor {
    type Interface = ConditioningDomain;
    type Crew = ConditioningCrew;

    fn instruct(&self, request: Request, crew: &mut ConditioningCrew, ctx: &Context) -> Result<Response> {
        match request {
            Request::List(_) => Ok(Response::List(ConditioningList {
                prompt_syntax: Vec::new(),
                preprocessors: hints::list(),
                max_tokens: MOST_CHUNKS * 75,
            })),
            Request::Preprocess(wish) => self.preprocess(&wish, ctx).map(Response::Preprocess),
            Request::Tokenize(wish) => {
                let checkpoint = crew.model.catalog.resolve(wish.model.as_deref())?;
                let positions = positions(&checkpoint)?;
                let tokenizers = crew.model.tokenizers.acquire(&checkpoint)?;
                let first = tokenizers.first.as_ref().map(|first| ("tokenizer", first));
                let list = |(name, tokenizer): (&'static str, &ClipTokenizer)| {
                    let tokens = ctx.perform(&Tokenize, TokenizeTask { tokenizer, text: &wish.text, field: "text" })?;
                    let chunks = chunks(tokens.len(), positions);
                    let ids = tokens.iter().map(|token| token.id).collect();
                    let count = tokens.len();
                    Ok(TokenList { name, ids, tokens: tokens.into_iter().map(|t| t.text).collect(), count, chunks })
                };
                let both = first.into_iter().chain([("tokenizer_2", &tokenizers.second)]);
                let tokenizers = both.map(list).collect::<Result<_>>()?;
                Ok(Response::Tokenize(Tokenized { model: checkpoint.name.clone(), tokenizers }))
            }
            Request::EncodePrompt(wish) => {
                let checkpoint = crew.model.catalog.resolve(wish.model.as_deref())?;
                let placement = crew.model.placement.clone();
                let placement =
                    placement.ok_or_else(|| Error::bug("a prompt was to be encoded beside the compute thread"))?;
                let wish = PromptWish {
                    prompt: wish.prompt,
                    prompt_2: wish.prompt_2,
                    negative_prompt: wish.negative_prompt,
                    negative_prompt_2: wish.negative_prompt_2,
                    clip_skip: wish.clip_skip,
                    guided: true,
                };
                let made = self.condition(&wish, &checkpoint, crew, &placement, ctx)?;
                let negative = made.negative.ok_or_else(|| Error::bug("a negative prompt was not encoded"))?;
                let dtype = placement.compute.name();
                Ok(Response::EncodePrompt(EncodedPrompt {
                    model: checkpoint.name.clone(),
                    positive: facts(&made.positive, dtype)?,
                    negative: facts(&negative, dtype)?,
                }))
            }
        }
    }
}

fn positive(wish: &PromptWish, checkpoint: &Checkpoint) -> Text {
    let second = (wish.prompt_2.as_ref(), "prompt_2");
    pair((&wish.prompt, "prompt"), second, checkpoint, wish.clip_skip.map_or(0, |skip| skip as usize))
}

fn negative(wish: &PromptWish, checkpoint: &Checkpoint) -> Text {
    let first = wish.negative_prompt.as_deref().unwrap_or_default();
    let second = (wish.negative_prompt_2.as_ref(), "negative_prompt_2");
    pair((first, "negative_prompt"), second, checkpoint, 0)
}

fn pair(
    first: (&str, &'static str),
    second: (Option<&String>, &'static str),
    checkpoint: &Checkpoint,
    skip: usize,
) -> Text {
    let own = second.0.filter(|text| !text.is_empty() && checkpoint.text_encoder.is_some());
    let (second, field) = own.map_or((first.0, first.1), |text| (text.as_str(), second.1));
    Text { texts: [first.0.to_owned(), second.to_owned()], fields: [first.1, field], skip }
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

/// The tokens for both encoders; none for the first where there is none.
fn tokenize(text: &Text, tokenizers: &Tokenizers, ctx: &Context) -> Result<[Vec<Token>; 2]> {
    let one = |tokenizer: &ClipTokenizer, place: usize| {
        let (text, field) = (&text.texts[place], text.fields[place]);
        let tokens = ctx.perform(&Tokenize, TokenizeTask { tokenizer, text, field })?;
        let most = MOST_CHUNKS * 75;
        if tokens.len() > most {
            return Err(Error::invalid(field, format!("must be at most {most} tokens, got {}", tokens.len())));
        }
        Ok(tokens)
    };
    let first = tokenizers.first.as_ref().map(|tokenizer| one(tokenizer, 0)).transpose()?;
    Ok([first.unwrap_or_default(), one(&tokenizers.second, 1)?])
}

fn rows_of(tokens: &[Vec<Token>; 2], tokenizers: &Tokenizers, count: usize, positions: usize) -> EncodeText {
    let [first, second] = tokens;
    EncodeText {
        first: tokenizers.first.as_ref().map(|t| rows(t, first, count, positions)).unwrap_or_default(),
        second: rows(&tokenizers.second, second, count, positions),
    }
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
