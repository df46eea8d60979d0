//! The queue in front of a lane: highest priority first, then first come, first served. Waiting raises the priority, so
//! no request starves.

use std::time::{Duration, Instant};

use crate::error::Error;
use crate::runtime::lane::Job;

/// Waiting time that weighs as much as one step of priority.
const AGEING: Duration = Duration::from_secs(5);

pub struct QueuedJob {
    pub priority: i64,
    pub arrived: Instant,
    order: u64,
    pub job: Job,
}

impl QueuedJob {
    /// Milliseconds of waiting plus the priority's equivalent.
    fn weight(&self, now: Instant) -> i128 {
        let waited = now.saturating_duration_since(self.arrived).as_millis();
        i128::from(self.priority) * AGEING.as_millis().cast_signed() + waited.cast_signed()
    }
}

pub struct Queue {
    limit: usize,
    waiting: Vec<QueuedJob>,
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

    /// Adds a job, and returns how many go before it.
    ///
    /// # Errors
    /// `queue_full`.
    pub fn push(&mut self, job: Job, priority: i64, now: Instant) -> Result<usize, Error> {
        if self.waiting.len() >= self.limit {
            return Err(Error::QueueFull { limit: self.limit });
        }
        Ok(self.put_back(job, priority, now))
    }

    /// Adds a job regardless of the limit, because it was accepted before.
    pub fn put_back(&mut self, job: Job, priority: i64, now: Instant) -> usize {
        self.arrivals += 1;
        let waiting = QueuedJob { priority, arrived: now, order: self.arrivals, job };
        let weight = waiting.weight(now);
        let ahead = self.waiting.iter().filter(|other| other.weight(now) >= weight).count();
        self.waiting.push(waiting);
        ahead
    }

    /// Removes the job that is next.
    pub fn take(&mut self, now: Instant) -> Option<Job> {
        let best = self.waiting.iter().enumerate().max_by_key(|(_, w)| (w.weight(now), std::cmp::Reverse(w.order)));
        let index = best.map(|(index, _)| index)?;
        Some(self.waiting.swap_remove(index).job)
    }

    /// Removes a job by its request.
    pub fn remove(&mut self, request_id: &str) -> Option<Job> {
        let index = self.waiting.iter().position(|waiting| waiting.job.request_id == request_id)?;
        Some(self.waiting.swap_remove(index).job)
    }

    /// The jobs in the order in which they would run now.
    #[must_use]
    pub fn in_order(&self, now: Instant) -> Vec<&QueuedJob> {
        let mut all: Vec<&QueuedJob> = self.waiting.iter().collect();
        all.sort_by_key(|waiting| (std::cmp::Reverse(waiting.weight(now)), waiting.order));
        all
    }
}
