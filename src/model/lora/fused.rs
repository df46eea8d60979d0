//! Merges plain LoRA on the CPU in one pass over the weight: all adapters for a block of rows at a time, on all threads. The
//! result equals that of the format's worker up to f32 rounding; the worker takes several passes over gigabytes of memory.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Result as CandleResult, Storage, Tensor};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::Result;
use crate::model::lora::formats::task::Parts;

/// Elements of a block of rows: 1 MiB in f32.
const BLOCK: usize = 1 << 18;

/// `W + Σ up · down` in `dtype`, with strength and alpha multiplied into `up`. `None` if a change has another format or does
/// not fit; the format's worker then merges it or reports the misfit.
///
/// # Errors
/// Errors of the device.
pub(crate) fn merge<'a>(
    base: &Tensor,
    dtype: DType,
    changes: impl Iterator<Item = (&'a Parts, f64)>,
) -> Result<Option<Tensor>> {
    let [rows, rest @ ..] = base.dims() else { return Ok(None) };
    let columns = rest.iter().product::<usize>();
    if rest.is_empty() || columns == 0 || !base.device().is_cpu() {
        return Ok(None);
    }
    let mut factors = Vec::new();
    for (parts, strength) in changes {
        match plain_factors(parts, (*rows, columns), strength)? {
            Some(pair) => factors.push(pair),
            None => return Ok(None),
        }
    }
    let base = base.contiguous()?;
    let (storage, layout) = base.storage_and_layout();
    let (Storage::Cpu(stored), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else { return Ok(None) };
    let Some(numbers) = WeightElements::of(stored, start..end) else { return Ok(None) };
    let factors = factors.iter().map(|(up, down)| Factor::of(up, down)).collect::<CandleResult<Vec<_>>>()?;
    let (shape, device, count) = (base.shape(), base.device(), end - start);
    let sums = MergeSum { numbers, columns, factors: &factors };
    // Zeroed memory is first touched by the thread that fills it.
    Ok(match dtype {
        DType::BF16 => {
            let mut all = vec![0_u16; count];
            sums.fill(&mut all, |wide, part| part.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(wide));
            Some(Tensor::from_vec(all.reinterpret_into::<bf16>(), shape, device)?)
        }
        DType::F16 => {
            let mut all = vec![0_u16; count];
            sums.fill(&mut all, |wide, part| part.reinterpret_cast_mut::<f16>().convert_from_f32_slice(wide));
            Some(Tensor::from_vec(all.reinterpret_into::<f16>(), shape, device)?)
        }
        DType::F32 => {
            let mut all = vec![0.0_f32; count];
            sums.fill(&mut all, |wide, part| part.copy_from_slice(wide));
            Some(Tensor::from_vec(all, shape, device)?)
        }
        _ => None,
    })
}

/// `up`, scaled by strength and alpha, and `down`, as matrices in f32; `None` if the parts are not plain LoRA.
fn plain_factors(
    parts: &Parts,
    (rows, columns): (usize, usize),
    strength: f64,
) -> CandleResult<Option<(Tensor, Tensor)>> {
    const ALL: [&str; 3] = ["lora_up.weight", "lora_down.weight", "alpha"];
    let (Some(up), Some(down)) = (parts.get(ALL[0]), parts.get(ALL[1])) else { return Ok(None) };
    let alpha = parts.get(ALL[2]);
    let is_plain = parts.keys().all(|part| ALL.contains(&part.as_str()));
    if !is_plain || up.rank() < 2 || down.rank() < 2 || alpha.is_some_and(|alpha| alpha.elem_count() != 1) {
        return Ok(None);
    }
    let wide = |part: &Tensor| part.to_dtype(DType::F32)?.flatten_from(1);
    let (up, down) = (wide(up)?, wide(down)?);
    let ((outputs, rank), (inner, inputs)) = (up.dims2()?, down.dims2()?);
    let finite = |part: &Tensor| Ok::<bool, candle_core::Error>(part.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite());
    if (outputs, inputs) != (rows, columns) || rank != inner || rank == 0 || rank > rows.max(columns) {
        return Ok(None);
    }
    let alpha = alpha.map(|alpha| alpha.to_dtype(DType::F32)?.flatten_all()?.get(0)?.to_scalar::<f32>()).transpose()?;
    let scale = strength * alpha.map_or(1.0, |alpha| f64::from(alpha) / rank as f64);
    if !scale.is_finite() || !finite(&up)? || !finite(&down)? {
        return Ok(None);
    }
    Ok(Some(((up * scale)?, down)))
}

/// The elements of a tensor in its dtype.
#[derive(Clone, Copy)]
enum WeightElements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> WeightElements<'a> {
    fn of(stored: &'a CpuStorage, range: Range<usize>) -> Option<Self> {
        match stored {
            CpuStorage::F32(numbers) => numbers.get(range).map(Self::F32),
            CpuStorage::F16(numbers) => numbers.get(range).map(Self::F16),
            CpuStorage::BF16(numbers) => numbers.get(range).map(Self::Bf16),
            _ => None,
        }
    }

    /// Fills `wide` with the elements from `first` on.
    fn widen(self, first: usize, wide: &mut [f32]) {
        let range = first..first + wide.len();
        match self {
            Self::F32(numbers) => wide.copy_from_slice(&numbers[range]),
            Self::F16(numbers) => numbers[range].convert_to_f32_slice(wide),
            Self::Bf16(numbers) => numbers[range].convert_to_f32_slice(wide),
        }
    }
}

/// `up`, `[rows, rank]`, and `down`, `[rank, columns]`.
struct Factor {
    up: Vec<f32>,
    down: Vec<f32>,
    rank: usize,
}

impl Factor {
    fn of(up: &Tensor, down: &Tensor) -> CandleResult<Self> {
        let flat = |part: &Tensor| part.flatten_all()?.to_vec1::<f32>();
        Ok(Self { up: flat(up)?, down: flat(down)?, rank: up.dim(1)? })
    }

    /// Adds `up · down` to `wide`, which holds whole rows of `columns` from row `first` on.
    fn add(&self, first: usize, columns: usize, wide: &mut [f32]) {
        let (rank, rows) = (self.rank, wide.len() / columns);
        let up = &self.up[first * rank..(first + rows) * rank];
        let down = &self.down[..rank * columns];
        let (across, depth) = (columns.cast_signed(), rank.cast_signed());
        #[expect(unsafe_code, reason = "the product is given as pointers and strides")]
        // SAFETY: `wide` has `rows · columns` numbers, `up` `rows · rank` and `down` `rank · columns`, as the slices above
        // have been cut; all are in row order, as the strides say, and `wide` is borrowed alone.
        unsafe {
            gemm::gemm(
                rows,
                columns,
                rank,
                wide.as_mut_ptr(),
                1,
                across,
                true,
                up.as_ptr(),
                1,
                depth,
                down.as_ptr(),
                1,
                across,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

/// A weight, and the changes to add to it.
struct MergeSum<'a> {
    numbers: WeightElements<'a>,
    columns: usize,
    factors: &'a [Factor],
}

impl MergeSum<'_> {
    /// Fills `all` with the sum; `narrow` converts f32 into the target dtype.
    fn fill<T: Send>(&self, all: &mut [T], narrow: impl Fn(&[f32], &mut [T]) + Sync) {
        let rows = (BLOCK / self.columns).max(1);
        let parts = all.par_chunks_mut(rows * self.columns).enumerate();
        parts.for_each_init(Vec::new, |wide: &mut Vec<f32>, (at, part)| {
            wide.resize(part.len(), 0.0);
            let first = at * rows;
            self.numbers.widen(first * self.columns, wide);
            self.factors.iter().for_each(|factor| factor.add(first, self.columns, wide));
            narrow(wide, part);
        });
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::merge;
    use crate::context::Context;
    use crate::model::lora::formats::detect;
    use crate::model::lora::formats::task::{MergeTask, Parts};
    use crate::noise::{NoiseSource, RngKind};

    fn random(seed: u64, shape: &[usize]) -> candle_core::Result<Tensor> {
        let count = shape.iter().product();
        let noise = NoiseSource::new(RngKind::Cpu, &[seed], 1, 1, count, &Device::Cpu).draw();
        noise.map_err(candle_core::Error::wrap)?.reshape(shape)
    }

    #[test]
    fn fused_merge_equals_merging_each_adapter_in_turn() -> crate::error::Result<()> {
        let alpha = Tensor::new(3.0_f32, &Device::Cpu)?;
        let one = |seed, up: &[usize], down: &[usize]| -> crate::error::Result<Parts> {
            let parts = [("lora_up.weight", random(seed, up)?), ("lora_down.weight", random(seed + 1, down)?)];
            let named = parts.into_iter().chain([("alpha", alpha.clone())]);
            Ok(named.map(|(name, part)| (name.to_owned(), part)).collect())
        };
        for (shape, up, down) in [
            (&[700, 900][..], &[700, 4][..], &[4, 900][..]),
            (&[5, 300_000], &[5, 2], &[2, 300_000]),
            (&[40, 30, 3, 3], &[40, 4, 1, 1], &[4, 30, 3, 3]),
        ] {
            let base = random(1, shape)?;
            let (first, second) = (one(2, up, down)?, one(4, up, down)?);
            let fast = merge(&base, DType::F32, [(&first, 0.7), (&second, -0.4)].into_iter())?;
            let mut slow = base.clone();
            for (parts, strength) in [(&first, 0.7), (&second, -0.4)] {
                let Some((_, format)) = detect("weight", |part| parts.contains_key(part)) else { panic!("no format") };
                let task = MergeTask { layer: "layer", tensor: "weight", base: &slow, parts, strength };
                slow = Context::detached().perform(format.merge, task)?;
            }
            let Some(fast) = fast else { panic!("not fused") };
            let worst = (&fast - &slow)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(worst < 1e-5, "{shape:?}: {worst}");
            let half = merge(&base.to_dtype(DType::BF16)?, DType::BF16, [(&first, 0.0)].into_iter())?;
            assert!(half.is_some_and(|half| half.dtype() == DType::BF16 && half.dims() == shape));
        }
        let wrong = one(2, &[8, 4], &[4, 9])?;
        assert!(merge(&random(1, &[8, 8])?, DType::F32, [(&wrong, 1.0)].into_iter())?.is_none());
        Ok(())
    }
}
