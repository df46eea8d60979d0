//! Turns names and numbers of a request into a sampling plan.

use super::interface::{Request, Response, Scheduler, Settings};
use crate::context::Context;
use crate::error::Result;
use crate::layers::{Instructor, Nothing};

pub struct SchedulerInstructor {
    pub settings: Settings,
}

impl Instructor for SchedulerInstructor {
    type Interface = Scheduler;
    type Crew = ();

    fn instruct(&self, _request: Request, _crew: &mut (), _ctx: &Context) -> Result<Response> {
        Ok(Response::Nothing(Nothing {}))
    }
}
