//! Downloads files of one commit of a repository into the local cache, in the layout that Hugging Face's tools share:
//! `blobs/<etag>` holds the bytes, `snapshots/<commit>/<path>` links to them, `refs/<revision>` holds the commit. A partial
//! download is `blobs/<etag>.incomplete`, and any of these tools can resume it.

pub(crate) mod blob;
pub(crate) mod http;
pub(crate) mod pins;
pub(crate) mod progress;
pub(crate) mod select;
pub(crate) mod session;

use crate::context::Context;
use crate::error::Result;
use crate::layers::Worker;
use crate::model::hub::fetch::pins::pinned;
use crate::model::hub::fetch::progress::DownloadProgress;
use crate::model::hub::fetch::select::select;
use crate::model::hub::fetch::session::{DownloadSession, HubEndpoint};
use crate::model::hub::reference::Reference;
use crate::model::interface::{FetchedFile, Pins};

pub(crate) struct FetchTask<'a> {
    pub(crate) hub: &'a HubEndpoint,
    pub(crate) reference: &'a Reference,
    /// Paths and patterns; if empty, the files of a model.
    pub(crate) files: &'a [String],
    pub(crate) pins: Option<&'a Pins>,
}

/// The files of a request, all in the cache.
pub(crate) struct Downloaded {
    pub(crate) commit: String,
    pub(crate) files: Vec<FetchedFile>,
}

/// Downloads the files that the cache lacks.
pub(crate) struct Fetch;

impl Worker<FetchTask<'_>> for Fetch {
    type Output = Downloaded;

    fn run(&self, task: FetchTask<'_>, ctx: &Context) -> Result<Downloaded> {
        let FetchTask { hub, reference, files, pins } = task;
        let session = DownloadSession::new(hub, reference, ctx)?;
        let listing = session.listing()?;
        let session = session.at_commit(&listing.sha);
        let names: Vec<String> = listing.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
        let chosen = select(&reference.repository, &names, files)?;
        let pinned = pinned(pins, &chosen)?;
        let size = |name: &String| listing.siblings.iter().find(|sibling| sibling.rfilename == *name)?.size;
        let mut progress = DownloadProgress::new(chosen.iter().filter_map(size).sum(), ctx);
        let mut fetched = Vec::with_capacity(chosen.len());
        for name in &chosen {
            progress.begin(name, size(name));
            let pin = pinned.iter().find(|(file, _)| file == name).map(|(_, hash)| hash.as_str());
            fetched.push(session.file(name, pin, &mut progress)?);
        }
        session.write_ref()?;
        Ok(Downloaded { commit: listing.sha, files: fetched })
    }
}
