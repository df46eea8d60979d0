//! Decides for the model domain.

use super::interface::{Model, Request, Response, Settings};
use crate::context::Context;
use crate::error::Result;
use crate::layers::{Instructor, Nothing};

pub struct ModelInstructor {
    pub settings: Settings,
}

impl Instructor for ModelInstructor {
    type Interface = Model;
    type Crew = ();

    fn instruct(&self, _request: Request, _crew: &mut (), _ctx: &Context) -> Result<Response> {
        Ok(Response::Nothing(Nothing {}))
    }
}
