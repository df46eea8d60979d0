//! Decides which device computes, and in which dtype.

use super::interface::{Device, Request, Response, Settings};
use super::manager::DeviceManager;
use crate::context::Context;
use crate::error::Result;
use crate::layers::{Instructor, Nothing};

pub struct DeviceInstructor {
    pub settings: Settings,
}

impl Instructor for DeviceInstructor {
    type Interface = Device;
    type Crew = DeviceManager;

    fn instruct(&self, _request: Request, _crew: &mut DeviceManager, _ctx: &Context) -> Result<Response> {
        Ok(Response::Nothing(Nothing {}))
    }
}
