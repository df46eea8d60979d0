//! The SHA-256 of a file (FIPS 180-4), read in blocks.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::layers::Worker;
use crate::model::catalog::files::ModelFile;

const BLOCK: usize = 1 << 20;

/// Hashes a file; the result is in hexadecimal digits.
pub(crate) struct Digest;

impl Worker<&Path> for Digest {
    type Output = String;

    fn run(&self, path: &Path, ctx: &Context) -> Result<String> {
        let (mut file, _) = ModelFile::open(path)?;
        let mut sum = Sha256::new();
        add_rest(&mut sum, &mut file, ctx)?.map_err(|error| Error::ModelCorrupt {
            path: path.to_owned(),
            message: format!("cannot be read: {error}"),
        })?;
        Ok(digits(sum))
    }
}

/// Adds the rest of a file. The inner error is an I/O error.
pub(crate) fn add_rest(sum: &mut Sha256, file: &mut File, ctx: &Context) -> Result<io::Result<()>> {
    let mut block = vec![0; BLOCK];
    loop {
        ctx.checkpoint()?;
        match file.read(&mut block) {
            Ok(0) => return Ok(Ok(())),
            Ok(count) => sum.update(block.get(..count).unwrap_or_default()),
            Err(error) => return Ok(Err(error)),
        }
    }
}

pub(crate) fn digits(sum: Sha256) -> String {
    sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
