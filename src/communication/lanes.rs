//! The three lanes as the event loop sees them: each a thread, the queue in front of it and the request it runs.

use std::time::Instant;

use crate::communication::queue::Queue;
use crate::runtime::lane::Lane;

/// One of the three threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneId {
    /// Makes images, one at a time.
    Compute,
    /// Answers requests that need no compute, also while an image is made.
    Query,
    /// Waits for the network, so that no other lane has to.
    Hub,
}

impl LaneId {
    pub const ALL: [Self; 3] = [Self::Compute, Self::Query, Self::Hub];
}

/// A lane and its queue.
pub struct LaneState {
    pub lane: Lane,
    pub queue: Queue,
    /// Id of the request that runs.
    pub running: Option<String>,
    pub ready: bool,
    /// Time of the lane's last event.
    pub last_event: Instant,
}

impl LaneState {
    #[must_use]
    pub fn new(lane: Lane, queue_limit: usize) -> Self {
        Self { lane, queue: Queue::new(queue_limit), running: None, ready: false, last_event: Instant::now() }
    }

    /// True if a job would run at once.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.running.is_none() && self.queue.is_empty()
    }
}

pub struct Lanes {
    pub compute: LaneState,
    pub query: LaneState,
    pub hub: LaneState,
}

impl Lanes {
    pub fn get_mut(&mut self, id: LaneId) -> &mut LaneState {
        match id {
            LaneId::Compute => &mut self.compute,
            LaneId::Query => &mut self.query,
            LaneId::Hub => &mut self.hub,
        }
    }

    /// Every lane, the compute lane first.
    #[must_use]
    pub fn all(&self) -> [&LaneState; 3] {
        [&self.compute, &self.query, &self.hub]
    }

    /// Requests that wait in front of all lanes.
    #[must_use]
    pub fn queue_depth(&self) -> usize {
        self.all().iter().map(|lane| lane.queue.len()).sum()
    }
}
