//! Checks a whole line: valid JSON, no duplicate key in an object, no nesting beyond the limit. It also finds the id, so
//! that a line that breaks off after its id is still answered under it.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::communication::interface::MAX_DEPTH;
use crate::communication::workers::codec::fault::Fault;
use crate::communication::workers::codec::path::{PathStep, pointer};
use crate::error::Error;

pub(crate) struct Scanned {
    /// As the line has it, unchecked.
    pub(crate) request_id: Option<String>,
    pub(crate) fault: Option<Fault>,
}

pub(crate) fn scan(text: &str) -> Scanned {
    let found = Findings::default();
    let mut json = serde_json::Deserializer::from_str(text);
    let whole = Scan { found: &found, depth: 0, is_id: false }.deserialize(&mut json).and_then(|()| json.end());
    let fault = whole.err().map(|e| Error::InvalidJson { message: e.to_string() }.into());
    Scanned { request_id: found.request_id.into_inner(), fault: fault.or(found.fault.into_inner()) }
}

#[derive(Default)]
struct Findings {
    request_id: RefCell<Option<String>>,
    fault: RefCell<Option<Fault>>,
    path: RefCell<Vec<PathStep>>,
}

impl Findings {
    fn blame(&self, message: impl FnOnce() -> String) {
        let mut fault = self.fault.borrow_mut();
        if fault.is_none() {
            *fault = Some(Fault::request(message(), Some(pointer("", &self.path.borrow()))));
        }
    }

    fn within<T>(&self, step: PathStep, work: impl FnOnce() -> T) -> T {
        self.path.borrow_mut().push(step);
        let result = work();
        self.path.borrow_mut().pop();
        result
    }
}

#[derive(Clone, Copy)]
struct Scan<'a> {
    found: &'a Findings,
    depth: usize,
    is_id: bool,
}

impl<'de> DeserializeSeed<'de> for Scan<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Scan<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        if self.is_id {
            self.found.request_id.borrow_mut().get_or_insert_with(|| text.to_owned());
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let inner = Scan { depth: self.depth + 1, is_id: false, ..self };
        if inner.depth > MAX_DEPTH {
            self.found.blame(|| format!("the line is nested deeper than {MAX_DEPTH}"));
            while items.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        }
        let mut index = 0;
        while self.found.within(PathStep::Index(index), || items.next_element_seed(inner))?.is_some() {
            index += 1;
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let depth = self.depth + 1;
        if depth > MAX_DEPTH {
            self.found.blame(|| format!("the line is nested deeper than {MAX_DEPTH}"));
            while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(());
        }
        let mut seen = HashSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            let is_id = depth == 1 && key == "request_id";
            self.found.within(PathStep::Key(key.clone()), || {
                if !seen.insert(key.clone()) {
                    self.found.blame(|| format!("the key `{key}` stands twice in one object"));
                }
                entries.next_value_seed(Scan { depth, is_id, ..self })
            })?;
        }
        Ok(())
    }
}
