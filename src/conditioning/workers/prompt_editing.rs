//! Prompt editing as in AUTOMATIC1111 (`modules/prompt_parser.py`): `[a|b]` alternates from step to step, `[a:b:5]`
//! changes from `a` to `b` after step 5, `[a:5]` inserts and `[a::5]` removes `a` there. A step with a decimal point is
//! a fraction of all steps. Evaluations are counted from 0, so the first span lasts one evaluation longer than its number.
//! Everything else is kept, including attention brackets.

use std::collections::BTreeSet;

use crate::conditioning::workers::prompt_attention::{MAX_DEPTH, PromptChar, error_at};
use crate::error::Result;

/// A prompt whose text depends on the step.
#[derive(Debug)]
pub(crate) struct EditedPrompt(Vec<EditNode>);

#[derive(Debug)]
enum EditNode {
    PromptChar(PromptChar),
    Scheduled { before: Vec<EditNode>, after: Vec<EditNode>, when: EditStep },
    Alternating(Vec<Vec<EditNode>>),
}

/// The step after which a text changes.
#[derive(Clone, Copy, Debug)]
enum EditStep {
    Step(f64),
    Fraction(f64),
}

impl EditStep {
    fn step(self, steps: usize) -> f64 {
        match self {
            Self::Step(step) => step.trunc(),
            Self::Fraction(fraction) => (fraction * steps as f64).trunc(),
        }
    }
}

impl EditedPrompt {
    /// # Errors
    /// `invalid_parameter`, with the character, for editing without a step and for brackets that nest too deep.
    pub(crate) fn parse(text: &[PromptChar], field: &str) -> Result<Self> {
        let partners = partners(text);
        EditParser { text, partners, field }.nodes(0, text.len(), 0).map(Self)
    }

    /// A prompt without syntax, which never changes.
    pub(crate) fn plain(text: &[PromptChar]) -> Self {
        Self(text.iter().copied().map(EditNode::PromptChar).collect())
    }

    /// The last step, 1 to `steps`, of each span in which the text is constant.
    pub(crate) fn span_ends(&self, steps: usize) -> BTreeSet<usize> {
        let mut span_ends = BTreeSet::from([steps]);
        collect_span_ends(&self.0, steps, &mut span_ends);
        span_ends
    }

    /// The text at a step, from 1.
    pub(crate) fn at(&self, step: usize, steps: usize) -> Vec<PromptChar> {
        let mut text = Vec::new();
        write_at(&self.0, step, steps, &mut text);
        text
    }
}

fn collect_span_ends(nodes: &[EditNode], steps: usize, span_ends: &mut BTreeSet<usize>) {
    for node in nodes {
        match node {
            EditNode::PromptChar(_) => {}
            EditNode::Scheduled { before, after, when } => {
                let when = when.step(steps);
                if when >= 1.0 {
                    span_ends.insert((when as usize).min(steps));
                }
                collect_span_ends(before, steps, span_ends);
                collect_span_ends(after, steps, span_ends);
            }
            EditNode::Alternating(_) => span_ends.extend(1..=steps),
        }
    }
}

fn write_at(nodes: &[EditNode], step: usize, steps: usize, text: &mut Vec<PromptChar>) {
    for node in nodes {
        match node {
            EditNode::PromptChar(character) => text.push(*character),
            EditNode::Scheduled { before, after, when } => {
                let now = if step as f64 <= when.step(steps) { before } else { after };
                write_at(now, step, steps, text);
            }
            EditNode::Alternating(choices) => {
                let now = choices.get(step.saturating_sub(1) % choices.len().max(1));
                write_at(now.map(Vec::as_slice).unwrap_or_default(), step, steps, text);
            }
        }
    }
}

/// For each opening bracket the position of its closing one. A mismatched closing bracket leaves all brackets that are
/// open there without a partner.
fn partners(text: &[PromptChar]) -> Vec<Option<usize>> {
    let mut partners = vec![None; text.len()];
    let mut open: Vec<(usize, char)> = Vec::new();
    let mut i = 0;
    while let Some(character) = text.get(i) {
        match character.c {
            '\\' => i += 1,
            '(' => open.push((i, ')')),
            '[' => open.push((i, ']')),
            c @ (')' | ']') => match open.pop() {
                Some((start, wanted)) if wanted == c => {
                    if let Some(partner) = partners.get_mut(start) {
                        *partner = Some(i);
                    }
                }
                _ => open.clear(),
            },
            _ => {}
        }
        i += 1;
    }
    partners
}

struct EditParser<'a> {
    text: &'a [PromptChar],
    partners: Vec<Option<usize>>,
    field: &'a str,
}

impl EditParser<'_> {
    /// Parses the text from `start` to `end`.
    fn nodes(&self, start: usize, end: usize, depth: usize) -> Result<Vec<EditNode>> {
        let mut nodes = Vec::with_capacity(end.saturating_sub(start));
        let mut i = start;
        while let Some(&character) = self.text.get(i).filter(|_| i < end) {
            let partner = self.partners.get(i).copied().flatten().filter(|&close| close < end);
            match (character.c, partner) {
                ('[', Some(close)) => {
                    nodes.extend(self.square_brackets(i, close, depth)?);
                    i = close + 1;
                    continue;
                }
                ('\\', _) => {
                    nodes.push(EditNode::PromptChar(character));
                    i += 1;
                    nodes.extend(self.text.get(i).filter(|_| i < end).copied().map(EditNode::PromptChar));
                }
                _ => nodes.push(EditNode::PromptChar(character)),
            }
            i += 1;
        }
        Ok(nodes)
    }

    /// Parses a pair of square brackets: editing, alternation, or attention.
    fn square_brackets(&self, open: usize, close: usize, depth: usize) -> Result<Vec<EditNode>> {
        let at = |position: usize| self.text.get(position).map_or(0, |character| character.index);
        if depth >= MAX_DEPTH {
            return Err(error_at(self.field, at(open), format_args!("brackets that nest deeper than {MAX_DEPTH}")));
        }
        let colons = self.separators(':', open, close);
        let last = colons.last().copied();
        let when = last.map(|colon| self.literal(colon + 1, close)).and_then(|literal| when(&literal));
        match (colons.as_slice(), when) {
            (&[colon], Some(when)) => {
                let after = self.nodes(open + 1, colon, depth + 1)?;
                return Ok(vec![EditNode::Scheduled { before: Vec::new(), after, when }]);
            }
            (&[first, second], Some(when)) => {
                let before = self.nodes(open + 1, first, depth + 1)?;
                let after = self.nodes(first + 1, second, depth + 1)?;
                return Ok(vec![EditNode::Scheduled { before, after, when }]);
            }
            (&[_, second], None) => {
                let literal = self.literal(second + 1, close);
                let what = format_args!("a schedule whose step is no number, `{}`,", literal.trim()).to_string();
                return Err(error_at(self.field, at(second + 1), what));
            }
            _ => {}
        }
        let bars = self.separators('|', open, close);
        if colons.is_empty() && !bars.is_empty() {
            let mut choices = Vec::with_capacity(bars.len() + 1);
            let mut start = open + 1;
            for end in bars.into_iter().chain([close]) {
                choices.push(self.nodes(start, end, depth + 1)?);
                start = end + 1;
            }
            return Ok(vec![EditNode::Alternating(choices)]);
        }
        let character = |position: usize| self.text.get(position).copied().map(EditNode::PromptChar);
        let mut nodes: Vec<EditNode> = character(open).into_iter().collect();
        nodes.extend(self.nodes(open + 1, close, depth + 1)?);
        nodes.extend(character(close));
        Ok(nodes)
    }

    /// Positions of `separator` between two brackets, outside any inner brackets.
    fn separators(&self, separator: char, open: usize, close: usize) -> Vec<usize> {
        let mut positions = Vec::new();
        let mut i = open + 1;
        while let Some(character) = self.text.get(i).filter(|_| i < close) {
            match (character.c, self.partners.get(i).copied().flatten()) {
                ('\\', _) => i += 1,
                (_, Some(partner)) => i = partner,
                (c, None) if c == separator => positions.push(i),
                _ => {}
            }
            i += 1;
        }
        positions
    }

    fn literal(&self, start: usize, end: usize) -> String {
        self.text.get(start..end).unwrap_or_default().iter().map(|character| character.c).collect()
    }
}

fn when(literal: &str) -> Option<EditStep> {
    let literal = literal.trim();
    let numeric = literal.chars().all(|c| c.is_ascii_digit() || "+-.eE".contains(c));
    let number: f64 = literal.parse().ok().filter(|number: &f64| numeric && number.is_finite())?;
    Some(if literal.contains('.') { EditStep::Fraction(number) } else { EditStep::Step(number) })
}

#[cfg(test)]
mod tests {
    use super::EditedPrompt;
    use crate::conditioning::workers::prompt_attention::{PromptChar, prompt_chars};

    fn spans(text: &str, steps: usize) -> Vec<(usize, String)> {
        let prompt = EditedPrompt::parse(&prompt_chars(text), "prompt").unwrap();
        let spell = |text: Vec<PromptChar>| text.iter().map(|character| character.c).collect();
        prompt.span_ends(steps).into_iter().map(|end| (end, spell(prompt.at(end, steps)))).collect()
    }

    fn check(text: &str, expected: &[(usize, &str)]) {
        let expected: Vec<(usize, String)> = expected.iter().map(|(end, text)| (*end, (*text).to_owned())).collect();
        assert_eq!(spans(text, 10), expected, "{text}");
    }

    #[test]
    fn texts_change_as_in_a1111() {
        check("test", &[(10, "test")]);
        check("a [b:3]", &[(3, "a "), (10, "a b")]);
        check("a [b: 3]", &[(3, "a "), (10, "a b")]);
        check("a [[[b]]:2]", &[(2, "a "), (10, "a [[b]]")]);
        check("[(a:2):3]", &[(3, ""), (10, "(a:2)")]);
        check("a [b : c : 1] d", &[(1, "a b  d"), (10, "a  c  d")]);
        check("a[b:[c:d:2]:1]e", &[(1, "abe"), (2, "ace"), (10, "ade")]);
        check("a [unbalanced", &[(10, "a [unbalanced")]);
        check("a [b:.5] c", &[(5, "a  c"), (10, "a b c")]);
        check("a [{b|d{:.5] c", &[(5, "a  c"), (10, "a {b|d{ c")]);
        check("((a][:b:c [d:3]", &[(3, "((a][:b:c "), (10, "((a][:b:c d")]);
    }

    #[test]
    fn alternatives_alternate_by_step() {
        let texts = |text: &str| spans(text, 10).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        let (a, b) = ("a".to_owned(), "(b:1.1)".to_owned());
        let expected: Vec<String> = (0..10).map(|i| if i % 2 == 0 { a.clone() } else { b.clone() }).collect();
        assert_eq!(texts("[a|(b:1.1)]"), expected);
        let expected: Vec<String> = (0..10).map(|i| if i % 2 == 0 { "female" } else { "male" }.to_owned()).collect();
        assert_eq!(texts("[fe|]male"), expected);
        let expected: Vec<String> = (0..10).map(|i| if i % 4 == 0 { "female" } else { "male" }.to_owned()).collect();
        assert_eq!(texts("[fe|||]male"), expected);
    }

    #[test]
    fn documented_example_has_five_spans() {
        let text = "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in \
                    foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]";
        let expected = [
            (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
            (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
            (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
            (75, "fantasy landscape with a lake and an oak in background masterful"),
            (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
        ];
        assert_eq!(spans(text, 100), expected.map(|(end, text)| (end, text.to_owned())));
    }

    #[test]
    fn text_without_editing_is_kept() {
        check(r"\[a:b:3\]", &[(10, r"\[a:b:3\]")]);
        check("a | b: c", &[(10, "a | b: c")]);
        check("[a:b]", &[(10, "[a:b]")]);
        check("(a|b)", &[(10, "(a|b)")]);
        check("[a::1.0]", &[(10, "a")]);
        check("[a:0]", &[(10, "a")]);
        check("[a:99]", &[(10, "")]);
        check("[a:-3]", &[(10, "a")]);
    }

    #[test]
    fn error_names_the_character() {
        let error = |text: &str| EditedPrompt::parse(&prompt_chars(text), "prompt").unwrap_err();
        let faulty_step = error("x [a:b:c] y");
        assert_eq!(faulty_step.code(), "invalid_parameter");
        assert_eq!(faulty_step.to_string(), "`prompt` has a schedule whose step is no number, `c`, at character 8");
        assert!(error("[a:b:]").to_string().ends_with("at character 6"));
        assert!(error(&format!("{}{}", "[".repeat(99), "]".repeat(99))).to_string().ends_with("at character 65"));
    }

    #[test]
    fn unclosed_brackets_parse_in_linear_time() {
        let text = "[(".repeat(30_000);
        assert_eq!(spans(&text, 10), [(10, text)]);
    }
}
