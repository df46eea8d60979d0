//! Requests that wait for a lane: the highest priority first, in order of arrival within one, and none for ever.

use std::time::{Duration, Instant};

use crate::error::Error;
use crate::runtime::lane::Job;

/// Waiting this long weighs as much as one step of priority, so that nothing starves.
const AGEING: Duration = Duration::from_secs(5);

pub struct Waiting {
    pub priority: i64,
    pub arrived: Instant,
    order: u64,
    pub job: Job,
}

impl Waiting {
    /// Milliseconds of waiting that this request counts as having.
    fn weight(&self, now: Instant) -> i128 {
        let waited = now.saturating_duration_since(self.arrived).as_millis();
        i128::from(self.priority) * AGEING.as_millis().cast_signed() + waited.cast_signed()
    }
}

pub struct Queue {
    limit: usize,
    waiting: Vec<Waiting>,
    arrivals: u64,
}

impl Queue {
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, waiting: Vec::new(), arrivals: 0 }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes a job, and says how many go before it.
    ///
    /// # Errors
    /// `queue_full`.
    pub fn push(&mut self, job: Job, priority: i64, now: Instant) -> Result<usize, Error> {
        if self.waiting.len() >= self.limit {
            return Err(Error::QueueFull { limit: self.limit });
        }
        Ok(self.put_back(job, priority, now))
    }

    /// As [`Self::push`], for a job that was taken once and has its place.
    pub fn put_back(&mut self, job: Job, priority: i64, now: Instant) -> usize {
        self.arrivals += 1;
        let waiting = Waiting { priority, arrived: now, order: self.arrivals, job };
        let weight = waiting.weight(now);
        let ahead = self.waiting.iter().filter(|other| other.weight(now) >= weight).count();
        self.waiting.push(waiting);
        ahead
    }

    /// The job whose turn it is.
    pub fn take(&mut self, now: Instant) -> Option<Job> {
        let best = self.waiting.iter().enumerate().max_by_key(|(_, w)| (w.weight(now), std::cmp::Reverse(w.order)));
        let place = best.map(|(place, _)| place)?;
        Some(self.waiting.swap_remove(place).job)
    }

    /// Takes a job out of its turn.
    pub fn remove(&mut self, request_id: &str) -> Option<Job> {
        let place = self.waiting.iter().position(|waiting| waiting.job.request_id == request_id)?;
        Some(self.waiting.swap_remove(place).job)
    }

    /// In the order in which they would run now.
    #[must_use]
    pub fn in_order(&self, now: Instant) -> Vec<&Waiting> {
        let mut all: Vec<&Waiting> = self.waiting.iter().collect();
        all.sort_by_key(|waiting| (std::cmp::Reverse(waiting.weight(now)), waiting.order));
        all
    }
}
