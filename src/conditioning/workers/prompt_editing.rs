//! Prompts that change while they are drawn, as AUTOMATIC1111's web UI defines them (`modules/prompt_parser.py`):
//! `[a|b]` alternates from step to step, `[a:b:5]` is `a` for five steps, and for one more as evaluations are counted
//! there from 0, and then `b`; `[a:5]` and `[a::5]` come and go. A step with a decimal point is a fraction of all steps.
//! Everything else stays as it is, attention's brackets too.

use std::collections::BTreeSet;

use crate::conditioning::workers::syntax::{DEPTH, Glyph, fault};
use crate::error::Result;

/// A text, as far as it depends on the step.
#[derive(Debug)]
pub(crate) struct Schedule(Vec<Node>);

#[derive(Debug)]
enum Node {
    Glyph(Glyph),
    Scheduled { before: Vec<Node>, after: Vec<Node>, when: When },
    Alternating(Vec<Vec<Node>>),
}

/// After which step a text changes.
#[derive(Clone, Copy, Debug)]
enum When {
    Step(f64),
    Fraction(f64),
}

impl When {
    fn step(self, steps: usize) -> f64 {
        match self {
            Self::Step(step) => step.trunc(),
            Self::Fraction(fraction) => (fraction * steps as f64).trunc(),
        }
    }
}

impl Schedule {
    /// # Errors
    /// `invalid_parameter`, with the character, for a schedule without its step and for brackets that nest too deep.
    pub(crate) fn parse(text: &[Glyph], field: &str) -> Result<Self> {
        let partners = partners(text);
        Reader { text, partners, field }.nodes(0, text.len(), 0).map(Self)
    }

    /// A text that does not change, whatever is in it.
    pub(crate) fn still(text: &[Glyph]) -> Self {
        Self(text.iter().copied().map(Node::Glyph).collect())
    }

    /// The last steps of the spans in which the text stays the same, of 1 to `steps`.
    pub(crate) fn ends(&self, steps: usize) -> BTreeSet<usize> {
        let mut ends = BTreeSet::from([steps]);
        collect(&self.0, steps, &mut ends);
        ends
    }

    /// The text at a step, from 1.
    pub(crate) fn at(&self, step: usize, steps: usize) -> Vec<Glyph> {
        let mut text = Vec::new();
        write(&self.0, (step, steps), &mut text);
        text
    }
}

fn collect(nodes: &[Node], steps: usize, ends: &mut BTreeSet<usize>) {
    for node in nodes {
        match node {
            Node::Glyph(_) => {}
            Node::Scheduled { before, after, when } => {
                let when = when.step(steps);
                if when >= 1.0 {
                    ends.insert((when as usize).min(steps));
                }
                collect(before, steps, ends);
                collect(after, steps, ends);
            }
            Node::Alternating(_) => ends.extend(1..=steps),
        }
    }
}

fn write(nodes: &[Node], (step, steps): (usize, usize), text: &mut Vec<Glyph>) {
    for node in nodes {
        match node {
            Node::Glyph(glyph) => text.push(*glyph),
            Node::Scheduled { before, after, when } => {
                let now = if step as f64 <= when.step(steps) { before } else { after };
                write(now, (step, steps), text);
            }
            Node::Alternating(choices) => {
                let now = choices.get(step.saturating_sub(1) % choices.len().max(1));
                write(now.map(Vec::as_slice).unwrap_or_default(), (step, steps), text);
            }
        }
    }
}

/// For each bracket that opens, where its partner closes. A bracket that closes what is not open leaves everything
/// open without a partner.
fn partners(text: &[Glyph]) -> Vec<Option<usize>> {
    let mut partners = vec![None; text.len()];
    let mut open: Vec<(usize, char)> = Vec::new();
    let mut i = 0;
    while let Some(glyph) = text.get(i) {
        match glyph.c {
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

struct Reader<'a> {
    text: &'a [Glyph],
    partners: Vec<Option<usize>>,
    field: &'a str,
}

impl Reader<'_> {
    /// What stands from `start` to `end`.
    fn nodes(&self, start: usize, end: usize, depth: usize) -> Result<Vec<Node>> {
        let mut nodes = Vec::with_capacity(end.saturating_sub(start));
        let mut i = start;
        while let Some(&glyph) = self.text.get(i).filter(|_| i < end) {
            let partner = self.partners.get(i).copied().flatten().filter(|&close| close < end);
            match (glyph.c, partner) {
                ('[', Some(close)) => {
                    nodes.extend(self.square(i, close, depth)?);
                    i = close + 1;
                    continue;
                }
                ('\\', _) => {
                    nodes.push(Node::Glyph(glyph));
                    i += 1;
                    nodes.extend(self.text.get(i).filter(|_| i < end).copied().map(Node::Glyph));
                }
                _ => nodes.push(Node::Glyph(glyph)),
            }
            i += 1;
        }
        Ok(nodes)
    }

    /// A pair of square brackets: a schedule, alternatives, or attention.
    fn square(&self, open: usize, close: usize, depth: usize) -> Result<Vec<Node>> {
        let at = |place: usize| self.text.get(place).map_or(0, |glyph| glyph.at);
        if depth >= DEPTH {
            return Err(fault(self.field, at(open), format_args!("brackets that nest deeper than {DEPTH}")));
        }
        let colons = self.separators(':', open, close);
        let last = colons.last().copied();
        let when = last.map(|colon| self.spelled(colon + 1, close)).and_then(|spelled| when(&spelled));
        match (colons.as_slice(), when) {
            (&[colon], Some(when)) => {
                let after = self.nodes(open + 1, colon, depth + 1)?;
                return Ok(vec![Node::Scheduled { before: Vec::new(), after, when }]);
            }
            (&[first, second], Some(when)) => {
                let before = self.nodes(open + 1, first, depth + 1)?;
                let after = self.nodes(first + 1, second, depth + 1)?;
                return Ok(vec![Node::Scheduled { before, after, when }]);
            }
            (&[_, second], None) => {
                let spelled = self.spelled(second + 1, close);
                let what = format_args!("a schedule whose step is no number, `{}`,", spelled.trim()).to_string();
                return Err(fault(self.field, at(second + 1), what));
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
            return Ok(vec![Node::Alternating(choices)]);
        }
        let glyph = |place: usize| self.text.get(place).copied().map(Node::Glyph);
        let mut nodes: Vec<Node> = glyph(open).into_iter().collect();
        nodes.extend(self.nodes(open + 1, close, depth + 1)?);
        nodes.extend(glyph(close));
        Ok(nodes)
    }

    /// Where `separator` stands between two brackets, and in none within.
    fn separators(&self, separator: char, open: usize, close: usize) -> Vec<usize> {
        let mut places = Vec::new();
        let mut i = open + 1;
        while let Some(glyph) = self.text.get(i).filter(|_| i < close) {
            match (glyph.c, self.partners.get(i).copied().flatten()) {
                ('\\', _) => i += 1,
                (_, Some(partner)) => i = partner,
                (c, None) if c == separator => places.push(i),
                _ => {}
            }
            i += 1;
        }
        places
    }

    fn spelled(&self, start: usize, end: usize) -> String {
        self.text.get(start..end).unwrap_or_default().iter().map(|glyph| glyph.c).collect()
    }
}

fn when(spelled: &str) -> Option<When> {
    let spelled = spelled.trim();
    let numeric = spelled.chars().all(|c| c.is_ascii_digit() || "+-.eE".contains(c));
    let number: f64 = spelled.parse().ok().filter(|number: &f64| numeric && number.is_finite())?;
    Some(if spelled.contains('.') { When::Fraction(number) } else { When::Step(number) })
}

#[cfg(test)]
mod tests {
    use super::Schedule;
    use crate::conditioning::workers::syntax::{Glyph, glyphs};

    fn spans(text: &str, steps: usize) -> Vec<(usize, String)> {
        let schedule = Schedule::parse(&glyphs(text), "prompt").unwrap();
        let spell = |text: Vec<Glyph>| text.iter().map(|glyph| glyph.c).collect();
        schedule.ends(steps).into_iter().map(|end| (end, spell(schedule.at(end, steps)))).collect()
    }

    fn check(text: &str, expected: &[(usize, &str)]) {
        let expected: Vec<(usize, String)> = expected.iter().map(|(end, text)| (*end, (*text).to_owned())).collect();
        assert_eq!(spans(text, 10), expected, "{text}");
    }

    #[test]
    fn texts_change_as_the_web_ui_documents() {
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
    fn alternatives_take_turns() {
        let turns = |text: &str| spans(text, 10).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        let (a, b) = ("a".to_owned(), "(b:1.1)".to_owned());
        let expected: Vec<String> = (0..10).map(|i| if i % 2 == 0 { a.clone() } else { b.clone() }).collect();
        assert_eq!(turns("[a|(b:1.1)]"), expected);
        let expected: Vec<String> = (0..10).map(|i| if i % 2 == 0 { "female" } else { "male" }.to_owned()).collect();
        assert_eq!(turns("[fe|]male"), expected);
        let expected: Vec<String> = (0..10).map(|i| if i % 4 == 0 { "female" } else { "male" }.to_owned()).collect();
        assert_eq!(turns("[fe|||]male"), expected);
    }

    #[test]
    fn the_documented_example_has_five_spans() {
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
    fn what_is_no_schedule_stays_as_it_is() {
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
    fn a_fault_points_at_its_character() {
        let fault = |text: &str| Schedule::parse(&glyphs(text), "prompt").unwrap_err();
        let error = fault("x [a:b:c] y");
        assert_eq!(error.code(), "invalid_parameter");
        assert_eq!(error.to_string(), "`prompt` has a schedule whose step is no number, `c`, at character 8");
        assert!(fault("[a:b:]").to_string().ends_with("at character 6"));
        assert!(fault(&format!("{}{}", "[".repeat(99), "]".repeat(99))).to_string().ends_with("at character 65"));
    }

    #[test]
    fn brackets_without_end_are_read_in_time() {
        let text = "[(".repeat(30_000);
        assert_eq!(spans(&text, 10), [(10, text)]);
    }
}
