//! A progress bar on stderr for people who pipe in requests by hand.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// A progress bar that is drawn only if stderr is a terminal.
pub struct Bar {
    is_terminal: bool,
    drawn: Option<ProgressBar>,
}

impl Bar {
    #[must_use]
    pub fn on_stderr() -> Self {
        Self { is_terminal: std::io::stderr().is_terminal(), drawn: None }
    }

    pub fn show(&mut self, stage: &'static str, done: usize, total: usize) {
        if !self.is_terminal {
            return;
        }
        let bar = self.drawn.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{msg:8} {wide_bar} {pos}/{len} {per_sec} {eta}");
            let bar = ProgressBar::new(0);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        bar.set_message(stage);
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    }

    pub fn clear(&mut self) {
        if let Some(bar) = self.drawn.take() {
            bar.finish_and_clear();
        }
    }
}
