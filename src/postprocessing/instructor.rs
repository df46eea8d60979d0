//! Decides for the postprocessing domain.

use super::interface::{Postprocessing, Request, Response, Settings};
use crate::context::Context;
use crate::error::Result;
use crate::layers::{Instructor, Nothing};

pub struct PostprocessingInstructor {
    pub settings: Settings,
}

impl Instructor for PostprocessingInstructor {
    type Interface = Postprocessing;
    type Crew = ();

    fn instruct(&self, _request: Request, _crew: &mut (), _ctx: &Context) -> Result<Response> {
        Ok(Response::Nothing(Nothing {}))
    }
}
