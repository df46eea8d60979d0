//! Decides for the conditioning domain.

use super::interface::{Conditioning, Request, Response, Settings};
use crate::context::Context;
use crate::error::Result;
use crate::layers::{Instructor, Nothing};

pub struct ConditioningInstructor {
    pub settings: Settings,
}

impl Instructor for ConditioningInstructor {
    type Interface = Conditioning;
    type Crew = ();

    fn instruct(&self, _request: Request, _crew: &mut (), _ctx: &Context) -> Result<Response> {
        Ok(Response::Nothing(Nothing {}))
    }
}
