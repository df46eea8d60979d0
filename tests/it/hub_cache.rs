//! The Hugging Face cache: read without a network, complete and broken.
#![expect(clippy::unwrap_used, reason = "what cannot be set up fails the test that wanted it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::slice;

use sdxl_worker::context::Context;
use sdxl_worker::device::scope::RequestScope;
use sdxl_worker::error::Result;
use sdxl_worker::layers::{Instructor, Nothing};
use sdxl_worker::model::checkpoint::Part;
use sdxl_worker::model::instructor::{ModelInstructor, ModelResources};
use sdxl_worker::model::interface::{HubSettings, ModelRequest, Request, Response, Settings};

use crate::conditioning::demo_folder;
use crate::hub::{FIRST, SECOND, UNET, bytes_of, demo};
use crate::hub_server::sha256;

/// A cache with the demonstration model as `owner/demo`, in the layout of Hugging Face's tools.
fn cached(cache: &Path) -> PathBuf {
    let repository = cache.join("models--owner--demo");
    for folder in ["blobs", "refs"] {
        fs::create_dir_all(repository.join(folder)).unwrap();
    }
    for (name, bytes) in demo() {
        let hash = sha256(&bytes);
        fs::write(repository.join("blobs").join(&hash), bytes).unwrap();
        let place = repository.join("snapshots").join(FIRST).join(&name);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        let up = if name.contains('/') { "../../../blobs" } else { "../../blobs" };
        std::os::unix::fs::symlink(Path::new(up).join(hash), place).unwrap();
    }
    fs::write(repository.join("refs/main"), FIRST).unwrap();
    repository
}

fn check(cache: &Path, roots: &[PathBuf], name: &str, wanted: Result<&str, &str>) {
    let hub = HubSettings { cache: Some(cache.to_owned()), ..HubSettings::default() };
    let mut resources = ModelResources::new(&Settings { roots: roots.to_vec(), hub, ..Settings::default() });
    let options = ModelRequest { model: Some(name.to_owned()), ..ModelRequest::default() };
    let (scope, ctx) = (RequestScope::Query { residents: Vec::new() }, Context::detached());
    let found = ModelInstructor.instruct(Request::Inspect(options), scope.with(&mut resources), &ctx);
    let found = found.map(|response| match response {
        Response::Inspect(inspection) => inspection.revision.clone().unwrap_or_default(),
        other => panic!("{other:?}"),
    });
    match (&found, wanted) {
        (Ok(revision), Ok(wanted)) => assert_eq!(revision, wanted, "{name}"),
        (Err(error), Err(wanted)) => assert_eq!(error.code(), wanted, "{name}: {error}"),
        _ => panic!("{name}: {found:?}, and {wanted:?} is wanted"),
    }
    let list = ModelInstructor.instruct(Request::List(Nothing {}), scope.with(&mut resources), &ctx);
    assert!(matches!(list, Ok(Response::List(_))), "{name}");
}

#[test]
fn hub_cache_is_read_as_it_is_and_broken_cache_is_an_error() {
    let broken = |name: &str, wanted: Result<&str, &str>, spoil: &dyn Fn(&Path)| {
        let cache = tempfile::tempdir().unwrap();
        let repository = cached(cache.path());
        spoil(&repository);
        check(cache.path(), &[], name, wanted);
    };
    let write = |path: PathBuf, text: &str| {
        let _ = fs::remove_file(&path);
        fs::write(path, text).unwrap();
    };
    let link = |to: &str, path: PathBuf| {
        let _ = fs::remove_file(&path);
        std::os::unix::fs::symlink(to, path).unwrap();
    };
    let unet = |repository: &Path| repository.join("snapshots").join(FIRST).join(UNET);
    let main = |repository: &Path| repository.join("refs/main");
    let name = "owner/demo";
    let fixed = format!("owner/demo@{FIRST}");
    broken(name, Ok(FIRST), &|_| ());
    broken(&fixed, Ok(FIRST), &|_| ());
    broken("owner/demo@v2", Err("offline"), &|_| ());
    broken("owner/other", Err("offline"), &|_| ());
    broken(name, Ok(FIRST), &|r| write(main(r), &format!("{FIRST}\n")));
    broken(name, Err("offline"), &|r| fs::remove_file(main(r)).unwrap());
    broken(&fixed, Ok(FIRST), &|r| fs::remove_file(main(r)).unwrap());
    broken(name, Err("offline"), &|r| write(main(r), SECOND));
    broken(name, Err("model_corrupt"), &|r| write(main(r), ""));
    broken(name, Err("model_corrupt"), &|r| write(main(r), "../../../../etc"));
    broken(name, Err("model_corrupt"), &|r| write(main(r), &"1".repeat(5000)));
    broken(name, Err("path_not_allowed"), &|r| link("/etc/passwd", main(r)));
    broken(name, Err("model_corrupt"), &|r| {
        fs::remove_file(main(r)).unwrap();
        fs::create_dir(main(r)).unwrap();
    });
    broken(name, Err("model_corrupt"), &|r| fs::remove_file(unet(r).canonicalize().unwrap()).unwrap());
    broken(name, Err("model_corrupt"), &|r| write(unet(r).canonicalize().unwrap(), "no safetensors"));
    broken(name, Err("model_corrupt"), &|r| fs::remove_file(unet(r)).unwrap());
    broken(name, Err("path_not_allowed"), &|r| link("/etc/passwd", unet(r)));
    broken(name, Err("path_not_allowed"), &|r| link("../../../../models--other/blobs/x", unet(r)));
    broken(name, Err("path_not_allowed"), &|r| link("/nonexistent", unet(r)));
    broken(name, Err("offline"), &|r| fs::remove_dir_all(r).unwrap());
}

#[test]
fn repository_file_or_folder_is_used_as_a_component() {
    let cache = tempfile::tempdir().unwrap();
    cached(cache.path());
    let mut resources = offline_resources(cache.path());
    // A whole model can be named for its component.
    for part in Part::ALL {
        let model = resources.catalog.resolve_with(Some("demo"), &[(part, Some("owner/demo"))]);
        assert!(model.is_ok(), "{part:?}: {model:?}");
    }
    let find = |name: &str| resources.catalog.component_file(name, "model").map(|found| found.file_bytes().0);
    let bytes = bytes_of(UNET).len() as u64;
    assert_eq!(find(&format!("owner/demo/{UNET}")).unwrap(), bytes);
    assert_eq!(find("owner/demo@main/unet/diffusion_pytorch_model").unwrap(), bytes);
    assert_eq!(find(&format!("owner/demo@{FIRST}/unet")).unwrap(), bytes);
    for (name, wanted) in [
        ("owner/demo/absent.safetensors", "offline"),
        ("owner/demo/../other/x", "path_not_allowed"),
        ("owner/demo/model_index.json", "model_unsupported"),
    ] {
        assert_eq!(find(name).unwrap_err().code(), wanted, "{name}");
    }
}

pub(super) fn offline_resources(cache: &Path) -> ModelResources {
    let hub = HubSettings { cache: Some(cache.to_owned()), ..HubSettings::default() };
    ModelResources::new(&Settings { roots: Vec::new(), hub, ..Settings::default() })
}

#[test]
fn folder_under_a_root_takes_precedence_over_the_hub() {
    let place = tempfile::tempdir().unwrap();
    let (cache, root) = (place.path().join("cache"), place.path().join("root"));
    cached(&cache);
    fs::create_dir_all(root.join("owner")).unwrap();
    check(&cache, slice::from_ref(&root), "owner/demo", Ok(FIRST));
    check(&cache, slice::from_ref(&root), "owner/dmeo", Err("model_not_found"));
    demo_folder(&root.join("owner/demo"));
    check(&cache, slice::from_ref(&root), "owner/demo", Ok(""));
    check(&cache, &[root], &format!("owner/demo@{FIRST}"), Ok(FIRST));
    // A root above the cache does not bypass the cache's own checks.
    check(&cache, slice::from_ref(&cache), "owner/demo", Ok(FIRST));
}
