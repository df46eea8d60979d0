//! Parses the prompts of a request into the texts to encode, and decides which of them guide which steps.

use std::collections::BTreeSet;

use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::prompt_options::PromptOptions;
use crate::conditioning::workers::prompt_attention::{
    Fragment, PromptChar, Subprompt, parse_attention, prompt_chars, subprompts,
};
use crate::conditioning::workers::prompt_chunks::check_length;
use crate::conditioning::workers::prompt_editing::EditedPrompt;
use crate::error::{Error, Result};
use crate::model::checkpoint::Checkpoint;

/// Most subprompts that `AND` may join: each adds a sample to every evaluation.
const MAX_SUBPROMPTS: usize = 16;
/// Most bytes of all prompts times the number of their changes, each of which parses them again.
const MAX_PARSED_BYTES: usize = 1 << 24;
/// Most fragments of one text with a weight below 1, each of which `compel` encodes separately.
const MAX_DOWNWEIGHTED: usize = 256;

/// One text for both encoders.
#[derive(Debug, PartialEq)]
pub(crate) struct PromptText {
    pub(crate) fragments: [Vec<Fragment>; 2],
    /// The request fields of the two texts, for errors.
    pub(crate) fields: [&'static str; 2],
    /// Layers skipped before the penultimate one.
    pub(crate) skip: usize,
}

/// A range of steps with the same texts; it begins where the span before it ends.
#[derive(Debug, PartialEq)]
pub(crate) struct PromptSpan {
    /// Number of completed steps at the end.
    pub(crate) until: usize,
    /// Index and weight of each subprompt's text.
    pub(crate) positive: Vec<(usize, f64)>,
    pub(crate) negative: Option<usize>,
}

#[derive(Debug)]
pub(crate) struct PromptPlan {
    /// Every distinct text, once.
    pub(crate) texts: Vec<PromptText>,
    /// In the order of the steps.
    pub(crate) spans: Vec<PromptSpan>,
}

/// A prompt as the request gives it.
#[derive(Clone, Copy)]
struct PromptField<'a> {
    text: &'a str,
    name: &'static str,
}

/// A prompt, or a part of one, as characters.
struct ParsedField {
    text: Vec<PromptChar>,
    name: &'static str,
}

/// A subprompt for both encoders.
struct PromptPair {
    prompts: [EditedPrompt; 2],
    fields: [&'static str; 2],
    skip: usize,
    weight: f64,
}

impl PromptPlan {
    /// `zeros` leaves out the text of the negative prompt.
    ///
    /// # Errors
    /// `invalid_parameter`, with the field and the character, for faulty syntax and too many changes.
    pub(crate) fn new(options: &PromptOptions, checkpoint: &Checkpoint, zeros: bool) -> Result<Self> {
        let (steps, weighting) = (options.steps.max(1), options.weighting);
        let skip = options.clip_skip.map_or(0, |skip| skip as usize);
        let prompt = PromptField { text: &options.prompt, name: "prompt" };
        let prompt_2 = PromptField { text: options.prompt_2.as_deref().unwrap_or_default(), name: "prompt_2" };
        let positive = positive_pairs(by_encoder(prompt, prompt_2, checkpoint), skip, weighting)?;
        let negative = options.negative_prompt.as_deref().unwrap_or_default();
        let negative_2 = options.negative_prompt_2.as_deref().unwrap_or_default();
        let given_bytes = [prompt.text, prompt_2.text, negative, negative_2].map(str::len).iter().sum();
        let mut pair = None;
        if (options.guided || positive.len() > 1) && !zeros {
            let negative = PromptField { text: negative, name: "negative_prompt" };
            let negative_2 = PromptField { text: negative_2, name: "negative_prompt_2" };
            let [first, second] = by_encoder(negative, negative_2, checkpoint);
            pair = Some(PromptPair::new(first.parse()?, second.parse()?, weighting)?);
        }
        let negative = pair;

        let mut ends = BTreeSet::from([steps]);
        for prompt in positive.iter().chain(&negative).flat_map(|pair| &pair.prompts) {
            ends.extend(prompt.span_ends(steps));
        }
        check_changes(ends.len(), given_bytes)?;
        let mut plan = Self { texts: Vec::new(), spans: Vec::new() };
        for until in ends {
            let positive = positive
                .iter()
                .map(|pair| Ok((plan.index_of(pair.at(until, steps, weighting)?), pair.weight)))
                .collect::<Result<Vec<_>>>()?;
            let negative = negative.as_ref().map(|pair| pair.at(until, steps, weighting)).transpose()?;
            let negative = negative.map(|text| plan.index_of(text));
            match plan.spans.last_mut() {
                Some(last) if last.positive == positive && last.negative == negative => last.until = until,
                _ => plan.spans.push(PromptSpan { until, positive, negative }),
            }
        }
        Ok(plan)
    }

    /// Most subprompts of a step.
    pub(crate) fn max_subprompts(&self) -> usize {
        self.spans.iter().map(|span| span.positive.len()).max().unwrap_or(1)
    }

    fn index_of(&mut self, text: PromptText) -> usize {
        let same = |known: &PromptText| known.fragments == text.fragments && known.skip == text.skip;
        self.texts.iter().position(same).unwrap_or_else(|| {
            self.texts.push(text);
            self.texts.len() - 1
        })
    }
}

impl PromptField<'_> {
    fn parse(self) -> Result<ParsedField> {
        check_length(self.text, self.name)?;
        Ok(ParsedField { text: prompt_chars(self.text), name: self.name })
    }
}

impl PromptPair {
    fn new(first: ParsedField, second: ParsedField, weighting: PromptWeighting) -> Result<Self> {
        let edited = |field: &ParsedField| match weighting {
            PromptWeighting::None => Ok(EditedPrompt::plain(&field.text)),
            _ => EditedPrompt::parse(&field.text, field.name),
        };
        let prompts = [edited(&first)?, edited(&second)?];
        Ok(Self { prompts, fields: [first.name, second.name], skip: 0, weight: 1.0 })
    }

    fn at(&self, step: usize, steps: usize, weighting: PromptWeighting) -> Result<PromptText> {
        let fragments = |encoder: usize| {
            let (prompt, field) = (&self.prompts[encoder], self.fields[encoder]);
            let text = prompt.at(step, steps);
            match weighting {
                PromptWeighting::None => {
                    let text = text.iter().map(|character| character.c).collect();
                    Ok(vec![Fragment::Text { text, weight: 1.0 }])
                }
                _ => parse_attention(&text, field).and_then(|all| check_downweighted(all, field, weighting)),
            }
        };
        Ok(PromptText { fragments: [fragments(0)?, fragments(1)?], fields: self.fields, skip: self.skip })
    }
}

/// The second encoder gets the first prompt if its own is empty, or if it is the checkpoint's only encoder.
fn by_encoder<'a>(first: PromptField<'a>, second: PromptField<'a>, checkpoint: &Checkpoint) -> [PromptField<'a>; 2] {
    let own = !second.text.is_empty() && checkpoint.text_encoder.is_some();
    [first, if own { second } else { first }]
}

/// The subprompts of a prompt. The second encoder's prompt has as many, or one for all of them.
fn positive_pairs(
    [first, second]: [PromptField<'_>; 2],
    skip: usize,
    weighting: PromptWeighting,
) -> Result<Vec<PromptPair>> {
    let (first, second) = (first.parse()?, second.parse()?);
    if weighting == PromptWeighting::None {
        return Ok(vec![PromptPair { skip, ..PromptPair::new(first, second, weighting)? }]);
    }
    let (firsts, seconds) = (subprompts(&first.text, first.name)?, subprompts(&second.text, second.name)?);
    if firsts.len() > MAX_SUBPROMPTS {
        let message = format!("must be at most {MAX_SUBPROMPTS} parts joined by `AND`, got {}", firsts.len());
        return Err(Error::invalid(first.name, message));
    }
    if seconds.len() != 1 && seconds.len() != firsts.len() {
        let (wanted, got) = (firsts.len(), seconds.len());
        return Err(Error::invalid(
            second.name,
            format!("must be one part or {wanted} like `{}`, got {got}", first.name),
        ));
    }
    let pair = |(index, own): (usize, &Subprompt)| {
        let other = seconds.get(index).or(seconds.first()).unwrap_or(own);
        if other.weight.is_some() && other.weight != own.weight {
            let message =
                format!("has a weight of its own for part {}: give the weights in `{}`", index + 1, first.name);
            return Err(Error::invalid(second.name, message));
        }
        let field = |part: &Subprompt, name| ParsedField { text: part.text.clone(), name };
        let pair = PromptPair::new(field(own, first.name), field(other, second.name), weighting)?;
        Ok(PromptPair { skip, weight: own.weight.unwrap_or(1.0), ..pair })
    };
    firsts.iter().enumerate().map(pair).collect()
}

fn check_changes(changes: usize, given_bytes: usize) -> Result<()> {
    if changes.saturating_mul(given_bytes) <= MAX_PARSED_BYTES {
        return Ok(());
    }
    Err(Error::invalid(
        "prompt",
        format!("and the other prompts together change {changes} times, too often for their {given_bytes} bytes"),
    ))
}

fn check_downweighted(fragments: Vec<Fragment>, field: &str, weighting: PromptWeighting) -> Result<Vec<Fragment>> {
    let downweighted = |fragment: &&Fragment| matches!(fragment, Fragment::Text { weight, .. } if *weight < 1.0);
    let got = fragments.iter().filter(downweighted).count();
    if weighting != PromptWeighting::Compel || got <= MAX_DOWNWEIGHTED {
        return Ok(fragments);
    }
    let message = format!("must have at most {MAX_DOWNWEIGHTED} fragments of a weight below 1 for `compel`, got {got}");
    Err(Error::invalid(field, message))
}
