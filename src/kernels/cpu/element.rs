//! The numbers the CPU kernels read and write, and how tensors lend them.

use std::ops::Deref;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, WithDType, bail};
use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::simd;
use crate::kernels::cpu::streaming_pack::as_bytes;

/// A dtype that widens to f32 exactly and is rounded to from f32.
pub(crate) trait Element: WithDType + Send + Sync {
    /// Whether f32 results may be built up in place.
    const IS_F32: bool;

    fn widen(self) -> f32;

    /// To nearest, ties to even; NaN stays NaN.
    fn round(value: f32) -> Self;

    /// [`Self::round`] of 16 numbers.
    #[inline(always)]
    fn round_block(from: &[f32; 16], to: &mut [Self; 16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = Self::round(*from);
        }
    }

    /// Numbers of no particular value, for whoever writes all of them: no pass over the memory is spent on filling it.
    #[cfg_attr(
        any(target_arch = "x86_64", target_arch = "aarch64"),
        expect(unsafe_code, reason = "a vector of what its memory holds")
    )]
    fn unwritten(count: usize) -> Vec<Self> {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        {
            let mut numbers: Vec<Self> = Vec::with_capacity(count);
            // SAFETY: there is memory for `count` numbers. An assembly block may write whatever its operands reach, so that
            // to the compiler the memory has been written; the processor has bytes there in any case, and any bytes are
            // a number of each of these types.
            unsafe {
                std::arch::asm!("/* {0} */", in(reg) numbers.as_mut_ptr(), options(nostack, preserves_flags));
                numbers.set_len(count);
            }
            numbers
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        vec![Self::zero(); count]
    }
}

impl Element for f32 {
    const IS_F32: bool = true;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const IS_F32: bool = false;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        let bits = value.to_bits();
        let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        Self::from_bits((if value.is_nan() { quiet } else { nearest }) as u16)
    }

    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "a function compiled for more than the baseline")]
    #[inline(always)]
    fn round_block(from: &[f32; 16], to: &mut [Self; 16]) {
        if simd::rounds_bf16() {
            // SAFETY: the level says that AVX-512 BF16 is here.
            unsafe { round_native(from, to) }
        } else {
            for (to, from) in to.iter_mut().zip(from) {
                *to = Self::round(*from);
            }
        }
    }
}

/// As [`bf16::round`] does, but for numbers beneath 2^-126, which become zeros.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions on pointers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round_native(from: &[f32; 16], to: &mut [bf16; 16]) {
    use std::arch::x86_64::{__m256bh, __m256i, _mm256_storeu_si256, _mm512_cvtneps_pbh, _mm512_loadu_ps};
    // SAFETY: 16 numbers are read, and as many written; any bits are bf16.
    unsafe {
        let narrow = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from.as_ptr())));
        _mm256_storeu_si256(to.as_mut_ptr().cast(), narrow);
    }
}

/// What quantised activations are held as.
impl Element for u8 {
    const IS_F32: bool = false;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        value.round_ties_even() as Self
    }
}

impl Element for f16 {
    const IS_F32: bool = false;

    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = bits & 0x7fff;
        let normal = (magnitude << 13) + (112 << 23);
        // Subnormals go by the integer unit: f32 subnormals as intermediate values would be slow.
        let subnormal = (magnitude as i32 as f32 * (1.0 / 16_777_216.0)).to_bits();
        let special = (magnitude << 13) | 0x7f80_0000;
        let wide = if magnitude < 0x400 { subnormal } else { normal };
        let wide = if magnitude >= 0x7c00 { special } else { wide };
        f32::from_bits(wide | ((bits & 0x8000) << 16))
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Numbers of whichever dtype a tensor has.
#[derive(Clone, Copy)]
pub(crate) enum Numbers<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// A tensor's memory, held for reading.
pub(crate) struct Held<'a> {
    /// The read lock, whose type candle does not re-export.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    layout: &'a Layout,
}

impl<'a> Held<'a> {
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage: Box::new(storage), layout }
    }

    fn cpu(&self) -> Result<&CpuStorage> {
        match &**self.storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("the operands lie on different devices"),
        }
    }

    /// From the tensor's first number on, for tensors that are read by their strides.
    pub(crate) fn strided<T: Element>(&self) -> Result<&[T]> {
        let all = T::cpu_storage_as_slice(self.cpu()?)?;
        match all.get(self.layout.start_offset()..) {
            Some(rest) => Ok(rest),
            None => bail!("a tensor begins beyond its storage"),
        }
    }

    /// All numbers in order. The tensor must be contiguous.
    pub(crate) fn slice<T: Element>(&self) -> Result<&[T]> {
        let Some((start, end)) = self.layout.contiguous_offsets() else {
            bail!("a contiguous tensor is wanted");
        };
        match T::cpu_storage_as_slice(self.cpu()?)?.get(start..end) {
            Some(numbers) => Ok(numbers),
            None => bail!("a tensor ends beyond its storage"),
        }
    }

    /// The numbers' bytes, in order. The tensor must be contiguous.
    pub(crate) fn bytes(&self) -> Result<&[u8]> {
        match self.cpu()? {
            CpuStorage::F32(_) => self.slice::<f32>().map(as_bytes),
            CpuStorage::BF16(_) => self.slice::<bf16>().map(as_bytes),
            CpuStorage::F16(_) => self.slice::<f16>().map(as_bytes),
            CpuStorage::U8(_) => self.slice::<u8>(),
            _ => bail!("weights must be f32, bf16, f16 or bytes"),
        }
    }

    pub(crate) fn numbers(&self) -> Result<Numbers<'_>> {
        match self.cpu()? {
            CpuStorage::F32(_) => self.slice().map(Numbers::F32),
            CpuStorage::BF16(_) => self.slice().map(Numbers::Bf16),
            CpuStorage::F16(_) => self.slice().map(Numbers::F16),
            _ => bail!("operands must be f32, bf16 or f16"),
        }
    }
}
