//! Paths that are no regular file: folders, pipes, sockets, devices, dangling, circular and escaping links; and names.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use super::Corpus;

const WRONG: &[&str] = &["model_corrupt", "path_not_allowed", "model_not_found", "model_unsupported"];
const OUT: &[&str] = &["path_not_allowed"];

/// Puts something that is not a regular file where a file is expected.
type Place = fn(&Path);

pub(super) fn add(corpus: &mut Corpus) {
    let places: [(&str, Place, &'static [&'static str]); 10] = [
        ("nothing", |_| (), &["model_corrupt", "model_unsupported"]),
        ("a folder", |path| fs::create_dir(path).unwrap(), WRONG),
        ("a pipe", |path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success()), WRONG),
        ("a socket", |path| drop(UnixListener::bind(path).unwrap()), WRONG),
        ("a device", |path| symlink("/dev/zero", path).unwrap(), OUT),
        ("a terminal", |path| symlink("/dev/tty", path).unwrap(), WRONG),
        ("a link to itself", |path| symlink(path.file_name().unwrap(), path).unwrap(), WRONG),
        ("a dangling link", |path| symlink("nowhere", path).unwrap(), WRONG),
        ("a link out", |path| symlink("/etc/passwd", path).unwrap(), OUT),
        ("a link up and out", |path| symlink("../../../../../../../../../etc/hostname", path).unwrap(), OUT),
    ];
    let files = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ];
    for file in files {
        for (what, place, codes) in places {
            corpus.model("places", &format!("{file} is {what}"), codes, |model| place(&short(&model.fresh(file))));
        }
    }
    corpus.model("places", "the UNet's folder is a link round", WRONG, |model| {
        fs::remove_dir_all(model.path().join("unet")).unwrap();
        symlink(".", model.path().join("unet")).unwrap();
    });
    corpus.model("places", "the UNet's folder is a link out", WRONG, |model| {
        fs::remove_dir_all(model.path().join("unet")).unwrap();
        symlink("/usr", model.path().join("unet")).unwrap();
    });
    corpus.model("places", "the UNet's file cannot be read", WRONG, |model| {
        // A chain of links longer than any system follows.
        let folder = model.path().join("unet");
        let file = model.fresh("unet/diffusion_pytorch_model.safetensors");
        for n in 0..60 {
            symlink(format!("l{}", n + 1), folder.join(format!("l{n}"))).unwrap();
        }
        symlink("l0", file).unwrap();
    });
    names(corpus);
    cache(corpus);
}

/// A socket's path has at most 108 bytes.
fn short(path: &Path) -> std::path::PathBuf {
    assert!(path.as_os_str().len() < 108, "{}", path.display());
    path.to_owned()
}

fn names(corpus: &mut Corpus) {
    let long = "a/".repeat(3000);
    let names = [
        "../x",
        "/etc",
        "/etc/passwd",
        "/proc/self/mem",
        "/dev/zero",
        "a\0b",
        "",
        " ",
        ".",
        "..",
        "./..",
        "a/../../b",
        &long,
        "\u{202e}x",
        "con",
        "x\n",
        "~",
        "file:///etc/passwd",
        "\\\\server\\share",
        "demo/../..",
    ];
    for name in names {
        corpus.ask_model("names", &format!("{name:.30?}"), name, &[]);
    }
    for (end, codes) in [
        ("ckpt", &["unsafe_format"][..]),
        ("pt", &["unsafe_format"]),
        ("bin", &["unsafe_format"]),
        ("txt", &["unsafe_format"]),
        ("zip", &["unsafe_format"]),
    ] {
        let name = format!("{}.{end}", corpus.name("file"));
        fs::write(corpus.root().join(&name), b"\x80\x02cos\nsystem\n(S'true'\ntR.").unwrap();
        corpus.ask_model("names", &format!("a file .{end}"), &name, codes);
    }
}

/// The layout of the Hugging Face cache: links into `blobs`.
fn cache(corpus: &mut Corpus) {
    let places: [(&str, Place); 4] = [
        ("is not there", |_| ()),
        ("is empty", |path| fs::write(path, "").unwrap()),
        ("is a folder", |path| fs::create_dir(path).unwrap()),
        ("leads out", |path| symlink("/etc/hostname", path).unwrap()),
    ];
    for (what, place) in places {
        corpus.model("cache", &format!("the blob {what}"), WRONG, |model| {
            fs::create_dir(model.path().join("blobs")).unwrap();
            place(&model.path().join("blobs/0123"));
            symlink("../blobs/0123", model.fresh("unet/diffusion_pytorch_model.safetensors")).unwrap();
        });
    }
}
