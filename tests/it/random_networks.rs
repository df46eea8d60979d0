//! Networks of random weights, too large to store: `tests/steer/layouts/` lists the tensors and their scales, and torch's
//! noise, which both sides draw identically, fills them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use sdxl_worker::noise::{NoiseSource, RngKind};

#[derive(serde::Deserialize)]
pub(crate) struct Layout {
    /// The script and the versions that made the layout.
    #[serde(rename = "made_by")]
    _made_by: String,
    pub(crate) seed: u64,
    /// `config.json`; null for a network in one file.
    pub(crate) config: Option<serde_json::Value>,
    /// Name, shape, scale, offset.
    pub(crate) tensors: Vec<(String, Vec<usize>, f32, f32)>,
}

impl Layout {
    pub(crate) fn open(name: &str) -> Self {
        Self::read(&layouts().join(format!("{name}.json")))
    }

    pub(crate) fn read(path: &Path) -> Self {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    pub(crate) fn fill(&self) -> HashMap<String, Tensor> {
        let total = self.tensors.iter().map(|(_, shape, ..)| shape.iter().product::<usize>()).sum();
        let mut source = NoiseSource::new(RngKind::Cpu, &[self.seed], 1, 1, total, &Device::Cpu);
        let all = source.draw().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut rest = all.as_slice();
        let mut tensor = |shape: &[usize], scale: f32, offset: f32| {
            let (own, others) = rest.split_at(shape.iter().product());
            rest = others;
            let values = own.iter().map(|value| value * scale + offset).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        self.tensors.iter().map(|(name, shape, scale, offset)| (name.clone(), tensor(shape, *scale, *offset))).collect()
    }

    /// Writes the network to `folder` under `name`, in diffusers' layout or as one file.
    pub(crate) fn write(&self, folder: &Path, name: &str) {
        let tensors = self.fill();
        let Some(config) = &self.config else {
            return candle_core::safetensors::save(&tensors, folder.join(format!("{name}.safetensors"))).unwrap();
        };
        let own = folder.join(name);
        fs::create_dir_all(&own).unwrap();
        fs::write(own.join("config.json"), config.to_string()).unwrap();
        candle_core::safetensors::save(&tensors, own.join("diffusion_pytorch_model.safetensors")).unwrap();
    }
}

fn layouts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steer/layouts")
}

/// A folder with every network, made once for all tests.
pub(crate) fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("networks");
        fs::create_dir_all(&folder).unwrap();
        for entry in fs::read_dir(layouts()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            Layout::open(&name).write(&folder, &name);
        }
        folder
    })
}
