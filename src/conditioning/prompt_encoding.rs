//! Encodes the texts of a prompt plan: splits them into chunks, takes known embeddings from the cache, and runs the text
//! encoders on the rest.

use std::collections::BTreeSet;

use candle_core::Tensor;

use crate::conditioning::interface::{AppliedEmbedding, CacheCount, PromptWeighting};
use crate::conditioning::manager::{ConditioningResources, EmbeddingKey};
use crate::conditioning::prompt_options::{EmbeddingChoice, PromptOptions};
use crate::conditioning::prompt_plan::{PromptPlan, PromptText};
use crate::conditioning::workers::encode::{Embeddings, EncodeTexts, EncodeTextsTask, TokenizedText};
use crate::conditioning::workers::prompt_chunks::{ChunkText, ChunkTextTask, ChunkedText, EmbeddingToken, empty_chunk};
use crate::context::{Context, Stage as ContextStage};
use crate::device::instructor::Placement;
use crate::error::{Error, Result, StageContext};
use crate::model::checkpoint::Checkpoint;
use crate::model::lora::LoraStack;
use crate::model::managers::{ClipTokenizer, ENCODERS, TextEncoders, Tokenizers};
use crate::model::networks::clip::FIRST_VECTOR;
use crate::model::textual_inversion::Inversion;

/// Most chunks of all texts of a request together: about 600 KiB each in f32.
const MAX_ENCODED_CHUNKS: usize = 1024;
/// Texts that the encoders read in one pass.
const TEXTS_PER_PASS: usize = 16;

pub(crate) struct PromptEncoding<'a> {
    pub(crate) options: &'a PromptOptions,
    pub(crate) plan: &'a PromptPlan,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) placement: &'a Placement,
    /// True if embeddings are taken from and kept in the cache.
    pub(crate) cached: bool,
}

pub(crate) struct EncodedTexts {
    /// One for each text of the plan.
    pub(crate) embeddings: Vec<Embeddings>,
    pub(crate) applied: Vec<AppliedEmbedding>,
    pub(crate) cache: CacheCount,
}

/// The inputs of the text encoders for all texts of the plan.
struct EncoderInputs<'a> {
    encoders: &'a TextEncoders,
    texts: &'a [TokenizedText],
    empty: &'a [Vec<u32>; 2],
    vectors: &'a [Option<Tensor>; 2],
}

impl PromptEncoding<'_> {
    /// # Errors
    /// `invalid_parameter` for prompts that are too long or a `clip_skip` beyond the encoders' layers; those of loading;
    /// those of the device.
    pub(crate) fn run(&self, resources: &mut ConditioningResources, ctx: &Context) -> Result<EncodedTexts> {
        let positions = positions(self.checkpoint)?;
        let inversions = LoadedInversions::read(&self.options.embeddings, self.checkpoint, self.placement, ctx)?;
        let tokenizers = resources.model.tokenizers.acquire(self.checkpoint)?;
        let texts = self.tokenize(&tokenizers, &inversions.tokens, positions, ctx)?;

        let unchanged = LoraStack::default();
        let stack = self.options.adapters.as_deref().unwrap_or(&unchanged);
        let keys = self.keys(&texts, stack);
        let cached = |key: &EmbeddingKey| resources.embeddings.get(key).filter(|_| self.cached);
        let mut embeddings: Vec<Option<Embeddings>> = keys.iter().map(cached).collect();
        let hits = embeddings.iter().flatten().count();
        let cache = CacheCount { hits, misses: texts.len() - hits };
        if cache.misses > 0 {
            let encoders = resources.model.encoders.adapted(self.checkpoint, stack, self.placement, ctx)?;
            let first = tokenizers.first.as_ref().map(|tokenizer| empty_chunk(tokenizer, positions));
            let empty = [first.unwrap_or_default(), empty_chunk(&tokenizers.second, positions)];
            let inputs =
                EncoderInputs { encoders: &encoders, texts: &texts, empty: &empty, vectors: &inversions.vectors };
            ctx.stage(ContextStage::Encode, || self.encode_missing(&inputs, &mut embeddings, ctx))?;
            drop(encoders);
            resources.model.encoded(self.checkpoint);
            if self.cached {
                for (key, encoded) in keys.into_iter().zip(embeddings.iter().flatten()) {
                    if resources.embeddings.get(&key).is_none() {
                        resources.embeddings.insert(key, encoded);
                    }
                }
            }
        }
        let embeddings = embeddings.into_iter().flatten().collect();
        Ok(EncodedTexts { embeddings, applied: inversions.applied, cache })
    }

    /// The plan's texts in chunks, padded to the same number of chunks.
    fn tokenize(
        &self,
        tokenizers: &Tokenizers,
        embeddings: &[EmbeddingToken],
        positions: usize,
        ctx: &Context,
    ) -> Result<Vec<TokenizedText>> {
        let chunked = |tokenizer: &ClipTokenizer, text: &PromptText, encoder: usize| {
            let (fragments, field) = (&text.fragments[encoder], text.fields[encoder]);
            let backtrack = self.options.backtrack;
            ctx.perform(&ChunkText, ChunkTextTask { tokenizer, fragments, embeddings, positions, backtrack, field })
        };
        let tokenized = |text: &PromptText| {
            let first = tokenizers.first.as_ref().map(|tokenizer| chunked(tokenizer, text, 0)).transpose()?;
            Ok(TokenizedText { by_encoder: [first.unwrap_or_default(), chunked(&tokenizers.second, text, 1)?] })
        };
        let mut texts = self.plan.texts.iter().map(tokenized).collect::<Result<Vec<_>>>()?;
        let chunks = texts.iter().flat_map(|text| &text.by_encoder).map(|text| text.chunks.len()).max().unwrap_or(1);
        if texts.len() * chunks > MAX_ENCODED_CHUNKS {
            let (got, most) = (texts.len(), MAX_ENCODED_CHUNKS / chunks);
            let message = format!(
                "and the other prompts together must be at most {most} texts of {chunks} chunks from step to step, got {got}"
            );
            return Err(Error::invalid("prompt", message));
        }
        for TokenizedText { by_encoder: [first, second] } in &mut texts {
            if let Some(tokenizer) = &tokenizers.first {
                first.pad(chunks, tokenizer, positions);
            }
            second.pad(chunks, &tokenizers.second, positions);
        }
        Ok(texts)
    }

    fn keys(&self, texts: &[TokenizedText], stack: &LoraStack) -> Vec<EmbeddingKey> {
        let adapters = stack.key(&ENCODERS);
        let key = |(planned, text): (&PromptText, &TokenizedText)| {
            let weighted = text.by_encoder.iter().any(ChunkedText::is_weighted);
            let mut ids = text.by_encoder.iter().flat_map(|text| &text.chunks).flat_map(|chunk| &chunk.ids);
            let has_vectors = ids.any(|&id| id >= FIRST_VECTOR);
            let embeddings = self.options.embeddings.iter().filter(|_| has_vectors);
            EmbeddingKey {
                checkpoint: self.checkpoint.key,
                dtype: self.placement.compute,
                device: self.placement.name.clone(),
                adapters,
                text: text.clone(),
                skip: planned.skip,
                weighting: if weighted { self.options.weighting } else { PromptWeighting::None },
                embeddings: embeddings.map(|choice| choice.file.key).collect(),
            }
        };
        self.plan.texts.iter().zip(texts).map(key).collect()
    }

    fn encode_missing(
        &self,
        inputs: &EncoderInputs<'_>,
        embeddings: &mut [Option<Embeddings>],
        ctx: &Context,
    ) -> Result<()> {
        let EncoderInputs { encoders, texts, empty, vectors } = *inputs;
        // Texts that skip the same layers share a pass.
        let skips: BTreeSet<usize> = self.plan.texts.iter().map(|text| text.skip).collect();
        for skip in skips {
            let missing = |&index: &usize| embeddings[index].is_none() && self.plan.texts[index].skip == skip;
            let missing: Vec<usize> = (0..texts.len()).filter(missing).collect();
            for indices in missing.chunks(TEXTS_PER_PASS) {
                let texts: Vec<&TokenizedText> = indices.iter().map(|&index| &texts[index]).collect();
                let task = EncodeTextsTask {
                    encoders,
                    device: &self.placement.device,
                    texts: &texts,
                    skip,
                    weighting: self.options.weighting,
                    empty,
                    vectors,
                };
                for (&index, encoded) in indices.iter().zip(ctx.perform(&EncodeTexts, task)?) {
                    embeddings[index] = Some(encoded);
                }
            }
        }
        Ok(())
    }
}

/// Positions of the shorter encoder.
///
/// # Errors
/// `model_unsupported` if there is no position for text.
pub(crate) fn positions(checkpoint: &Checkpoint) -> Result<usize> {
    let both = checkpoint.text_encoder.iter().chain([&checkpoint.text_encoder_2]);
    let least = both.map(|config| config.max_position_embeddings).min().unwrap_or(0);
    if least < 3 {
        let message = format!("its text encoders have {least} positions, and a text needs at least 3");
        return Err(Error::ModelUnsupported { name: checkpoint.name.clone(), message });
    }
    Ok(least.min(77))
}

/// The textual inversions of a request.
struct LoadedInversions {
    tokens: Vec<EmbeddingToken>,
    /// `[V, C]` for each encoder: the vectors of all inversions.
    vectors: [Option<Tensor>; 2],
    applied: Vec<AppliedEmbedding>,
}

impl LoadedInversions {
    fn read(
        choices: &[EmbeddingChoice],
        checkpoint: &Checkpoint,
        placement: &Placement,
        ctx: &Context,
    ) -> Result<Self> {
        let (mut tokens, mut applied, mut next_id) = (Vec::new(), Vec::new(), FIRST_VECTOR);
        let (mut firsts, mut seconds) = (Vec::new(), Vec::new());
        for EmbeddingChoice { file, token } in choices {
            let Inversion { first, second, count } = Inversion::read(file, checkpoint, &placement.device, ctx)?;
            let encoders = first.as_ref().map(|_| "text_encoder").into_iter().chain(["text_encoder_2"]).collect();
            applied.push(AppliedEmbedding { name: file.name.clone(), token: token.clone(), vectors: count, encoders });
            tokens.push(EmbeddingToken { token: token.clone(), first: next_id, count });
            next_id += u32::try_from(count).unwrap_or(0);
            firsts.extend(first);
            seconds.push(second);
        }
        let concat = |vectors: &[Tensor]| match vectors.is_empty() {
            true => Ok(None),
            false => Tensor::cat(vectors, 0).map(Some).stage("text encoder"),
        };
        Ok(Self { tokens, vectors: [concat(&firsts)?, concat(&seconds)?], applied })
    }
}
