//! Reads the prompts of a request: which texts there are, and which of them is told at which step.

use std::collections::BTreeSet;

use crate::conditioning::instructor::PromptOptions;
use crate::conditioning::interface::PromptWeighting;
use crate::conditioning::workers::prompt::LONGEST;
use crate::conditioning::workers::prompt_editing::Schedule;
use crate::conditioning::workers::syntax::{Fragment, Glyph, attention, glyphs, parts};
use crate::error::{Error, Result};
use crate::model::checkpoint::Checkpoint;

/// Most prompts that `AND` may join: each is a sample more in every evaluation.
const MOST_PARTS: usize = 16;
/// Bytes of prompts that are read in all, those that change anew for each change.
const MOST_WRITTEN: usize = 1 << 24;
/// Fragments of one text whose weight is below 1, where each is encoded once more.
const MOST_LESSENED: usize = 256;

/// One text for both encoders, decided.
#[derive(Debug, PartialEq)]
pub(crate) struct Text {
    pub(crate) fragments: [Vec<Fragment>; 2],
    pub(crate) fields: [&'static str; 2],
    /// Layers left out before the penultimate one.
    pub(crate) skip: usize,
}

/// What is told until a step, as places among the texts.
#[derive(Debug, PartialEq)]
pub(crate) struct Telling {
    /// Steps that are done when it ends.
    pub(crate) until: usize,
    /// With the weight of each part.
    pub(crate) positive: Vec<(usize, f64)>,
    pub(crate) negative: Option<usize>,
}

#[derive(Debug)]
pub(crate) struct Reading {
    /// Each once.
    pub(crate) texts: Vec<Text>,
    /// In the order of the steps.
    pub(crate) tellings: Vec<Telling>,
}

/// A prompt, or a part of one, for both encoders.
struct Pair {
    schedules: [Schedule; 2],
    fields: [&'static str; 2],
    skip: usize,
    weight: f64,
}

/// A field and its text.
type Source<'a> = (&'a str, &'static str);

/// `zeros`: the negative prompt is no text.
///
/// # Errors
/// `invalid_parameter`, with the field and the character, for what cannot be read.
pub(crate) fn read(options: &PromptOptions, checkpoint: &Checkpoint, zeros: bool) -> Result<Reading> {
    let steps = options.steps.max(1);
    let skip = options.clip_skip.map_or(0, |skip| skip as usize);
    let both = sources((&options.prompt, "prompt"), (options.prompt_2.as_deref(), "prompt_2"), checkpoint);
    let positive = composed(both, skip, options.weighting)?;
    let first = options.negative_prompt.as_deref().unwrap_or_default();
    let second = (options.negative_prompt_2.as_deref(), "negative_prompt_2");
    let told = (options.guided || positive.len() > 1) && !zeros;
    let negative = told
        .then(|| {
            let both = sources((first, "negative_prompt"), second, checkpoint);
            pair(both.map(|source| Ok((spelled(source)?, source.1))), 0, 1.0, options.weighting)
        })
        .transpose()?;

    let mut ends = BTreeSet::from([steps]);
    for schedule in positive.iter().chain(&negative).flat_map(|pair| &pair.schedules) {
        ends.extend(schedule.ends(steps));
    }
    let others = [second.0, options.prompt_2.as_deref()].into_iter().flatten();
    let written = options.prompt.len() + first.len() + others.map(str::len).sum::<usize>();
    if ends.len().saturating_mul(written) > MOST_WRITTEN {
        let got = ends.len();
        return Err(Error::invalid(
            "prompt",
            format!("and the other prompts together change {got} times, too often for their {written} bytes"),
        ));
    }
    let mut reading = Reading { texts: Vec::new(), tellings: Vec::new() };
    for until in ends {
        let positive = positive
            .iter()
            .map(|pair| Ok((reading.place(pair.at((until, steps), options.weighting)?), pair.weight)))
            .collect::<Result<Vec<_>>>()?;
        let negative = negative.as_ref().map(|pair| pair.at((until, steps), options.weighting)).transpose()?;
        let negative = negative.map(|text| reading.place(text));
        match reading.tellings.last_mut() {
            Some(last) if last.positive == positive && last.negative == negative => last.until = until,
            _ => reading.tellings.push(Telling { until, positive, negative }),
        }
    }
    Ok(reading)
}

impl Reading {
    fn place(&mut self, text: Text) -> usize {
        let same = |known: &Text| known.fragments == text.fragments && known.skip == text.skip;
        self.texts.iter().position(same).unwrap_or_else(|| {
            self.texts.push(text);
            self.texts.len() - 1
        })
    }
}

impl Pair {
    fn at(&self, (step, steps): (usize, usize), weighting: PromptWeighting) -> Result<Text> {
        let [first, second] = [0, 1].map(|place| {
            let (schedule, field) = (&self.schedules[place], self.fields[place]);
            let text = schedule.at(step, steps);
            match weighting {
                PromptWeighting::None => {
                    let text = text.iter().map(|glyph| glyph.c).collect();
                    Ok(vec![Fragment::Text { text, weight: 1.0 }])
                }
                _ => attention(&text, field).and_then(|fragments| few(fragments, field, weighting)),
            }
        });
        Ok(Text { fragments: [first?, second?], fields: self.fields, skip: self.skip })
    }
}

/// `compel` encodes a text once more for every fragment of less than full weight.
fn few(fragments: Vec<Fragment>, field: &str, weighting: PromptWeighting) -> Result<Vec<Fragment>> {
    let lessened = |fragment: &&Fragment| matches!(fragment, Fragment::Text { weight, .. } if *weight < 1.0);
    let got = fragments.iter().filter(lessened).count();
    if weighting != PromptWeighting::Compel || got <= MOST_LESSENED {
        return Ok(fragments);
    }
    let what = format!("must have at most {MOST_LESSENED} fragments of a weight below 1 for `compel`, got {got}");
    Err(Error::invalid(field, what))
}

/// A missing or empty second prompt is the first; so is that of a model with the second encoder alone.
fn sources<'a>(first: Source<'a>, second: (Option<&'a str>, &'static str), checkpoint: &Checkpoint) -> [Source<'a>; 2] {
    let own = second.0.filter(|text| !text.is_empty() && checkpoint.text_encoder.is_some());
    [first, own.map_or(first, |text| (text, second.1))]
}

fn spelled((text, field): Source) -> Result<Vec<Glyph>> {
    if text.len() > LONGEST {
        return Err(Error::invalid(field, format!("must be at most {LONGEST} bytes, got {}", text.len())));
    }
    Ok(glyphs(text))
}

fn pair(
    [first, second]: [Result<(Vec<Glyph>, &'static str)>; 2],
    skip: usize,
    weight: f64,
    weighting: PromptWeighting,
) -> Result<Pair> {
    let (first, second) = (first?, second?);
    let schedule = |(text, field): &(Vec<Glyph>, &'static str)| match weighting {
        PromptWeighting::None => Ok(Schedule::still(text)),
        _ => Schedule::parse(text, field),
    };
    Ok(Pair { schedules: [schedule(&first)?, schedule(&second)?], fields: [first.1, second.1], skip, weight })
}

/// The parts of a prompt. The second encoder's prompt is one for all, or has as many.
fn composed(both: [Source; 2], skip: usize, weighting: PromptWeighting) -> Result<Vec<Pair>> {
    let [first, second] = both;
    if weighting == PromptWeighting::None {
        return Ok(vec![pair(both.map(|source| Ok((spelled(source)?, source.1))), skip, 1.0, weighting)?]);
    }
    let split = |source: Source| parts(&spelled(source)?, source.1);
    let (firsts, seconds) = (split(first)?, split(second)?);
    if firsts.len() > MOST_PARTS {
        let got = firsts.len();
        return Err(Error::invalid(first.1, format!("must be at most {MOST_PARTS} parts joined by `AND`, got {got}")));
    }
    if seconds.len() != 1 && seconds.len() != firsts.len() {
        let (wanted, got) = (firsts.len(), seconds.len());
        return Err(Error::invalid(second.1, format!("must be one part or {wanted} like `{}`, got {got}", first.1)));
    }
    let part = |(place, part): (usize, &crate::conditioning::workers::syntax::Part)| {
        let other = seconds.get(place).or(seconds.first()).unwrap_or(part);
        let differs = other.weight.is_some() && other.weight != part.weight;
        if differs {
            let message = format!("has a weight of its own for part {}: the weights stand in `{}`", place + 1, first.1);
            return Err(Error::invalid(second.1, message));
        }
        let texts = [Ok((part.text.clone(), first.1)), Ok((other.text.clone(), second.1))];
        pair(texts, skip, part.weight.unwrap_or(1.0), weighting)
    };
    firsts.iter().enumerate().map(part).collect()
}
