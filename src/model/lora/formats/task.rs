//! The input of a format, and the products that most formats build their change from. Every size is compared with the
//! layer's before anything is multiplied.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::model::lora::formats::dora;

/// The tensors of a file for one layer, in f32 on the network's device. Keys are kohya's part names, whoever wrote the
/// file: `lora_A.weight`, `lora.down.weight` and `lora_linear_layer.down.weight` become `lora_down.weight`,
/// `lora_B.bias` becomes `lora_up.bias`, and PEFT's `lora_magnitude_vector.weight` becomes `lora_magnitude_vector`.
pub type Parts = BTreeMap<String, Tensor>;

/// Most elements that one part of an adapter may have for a tensor of shape `base`. Checked before a part is read, since a
/// header may claim any size.
pub fn part_limit(base: &[usize]) -> usize {
    // Ranks up to the layer's width, and at least the ranks that people train, however small the layer is.
    match base {
        [] | [_] => base.iter().product(),
        [outputs, inputs, kernel @ ..] => {
            let width = (*outputs).max(*inputs).max(512);
            kernel.iter().fold(width.saturating_mul(width), |product, &side| product.saturating_mul(side))
        }
    }
}

/// A tensor of the network, and the file's parts for its layer.
pub struct MergeTask<'a> {
    /// diffusers' name of the layer, for messages.
    pub layer: &'a str,
    /// `weight` or `bias`.
    pub tensor: &'static str,
    /// The tensor with all earlier changes, in f32 and in the layout of files: `[O, I]`, `[O, I, K, K]` or `[C]`.
    pub base: &'a Tensor,
    pub parts: &'a Parts,
    /// Factor on the change.
    pub strength: f64,
}

impl MergeTask<'_> {
    pub(crate) fn misfit(&self, message: impl Into<String>) -> Error {
        Error::ModelUnsupported { name: self.layer.to_owned(), message: message.into() }
    }

    /// # Errors
    /// `model_unsupported` if the part is missing, too large for the layer, or has non-finite values.
    pub(crate) fn part(&self, name: &str) -> Result<&Tensor> {
        self.optional(name)?.ok_or_else(|| self.misfit(format!("`{name}` is missing")))
    }

    /// # Errors
    /// The errors of [`Self::part`], except that the part may be missing.
    pub(crate) fn optional(&self, name: &str) -> Result<Option<&Tensor>> {
        let Some(part) = self.parts.get(name) else { return Ok(None) };
        if part.elem_count() == 0 || part.elem_count() > part_limit(self.base.dims()) {
            return Err(self.unfit(name, part));
        }
        if !part.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err(self.misfit(format!("`{name}` has values that are not finite")));
        }
        Ok(Some(part))
    }

    pub(crate) fn unfit(&self, name: &str, part: &Tensor) -> Error {
        self.misfit(format!("`{name}` of shape {:?} does not fit {:?}", part.dims(), self.base.dims()))
    }

    /// `O`, and the elements of an output: `I · K · K`.
    pub(crate) fn sides(&self) -> Result<(usize, usize)> {
        match *self.base.dims() {
            [outputs, inputs, ref kernel @ ..] if !self.base.dims().contains(&0) => {
                Ok((outputs, inputs * kernel.iter().product::<usize>()))
            }
            _ => Err(self.misfit(format!("the format cannot change tensors of shape {:?}", self.base.dims()))),
        }
    }

    /// A part as a matrix: its first axis, and the others flattened.
    pub(crate) fn matrix(&self, name: &str) -> Result<Tensor> {
        let part = self.part(name)?;
        if part.rank() < 2 { Err(self.unfit(name, part)) } else { Ok(part.flatten_from(1)?) }
    }

    /// A part that is a single number.
    pub(crate) fn number(&self, name: &str) -> Result<Option<f64>> {
        let Some(part) = self.optional(name)? else { return Ok(None) };
        if part.elem_count() != 1 {
            return Err(self.misfit(format!("`{name}` must be a number, and has the shape {:?}", part.dims())));
        }
        Ok(Some(f64::from(part.flatten_all()?.get(0)?.to_scalar::<f32>()?)))
    }

    /// `alpha / R`; 1 for files without an alpha.
    pub(crate) fn scale(&self, rank: usize) -> Result<f64> {
        Ok(self.number("alpha")?.map_or(1.0, |alpha| alpha / rank as f64))
    }

    /// `left · right` of two parts as matrices, and their rank. The product is at most as large as the tensor itself.
    pub(crate) fn product(&self, left: &str, right: &str) -> Result<(Tensor, usize)> {
        let (a, b) = (self.matrix(left)?, self.matrix(right)?);
        let ((rows, rank), (inner, columns)) = (a.dims2()?, b.dims2()?);
        if rank != inner || rows.checked_mul(columns).is_none_or(|count| count > self.base.elem_count()) {
            let message =
                format!("`{left}` {rows}×{rank} times `{right}` {inner}×{columns} does not fit {:?}", self.base.dims());
            return Err(self.misfit(message));
        }
        Ok((a.matmul(&b)?, rank))
    }

    /// `Σ core[m, n] · left[m] · right[n]`, for each position of the kernel: `[M, O]`, `[N, I]`, `[M, N, K, K]` →
    /// `[O, I·K·K]`, and the rank `N`. The Tucker decomposition of De Lathauwer et al. 2000,
    /// <https://doi.org/10.1137/S0895479896305696>, in the two modes that are channels.
    pub(crate) fn tucker(&self, core: &str, left: &Tensor, right: &Tensor) -> Result<(Tensor, usize)> {
        let part = self.part(core)?;
        let (&[m, n, ref kernel @ ..], (rows, outputs), (columns, inputs)) =
            (part.dims(), left.dims2()?, right.dims2()?)
        else {
            return Err(self.unfit(core, part));
        };
        let area: usize = kernel.iter().product();
        let count = outputs.checked_mul(inputs).and_then(|count| count.checked_mul(area));
        let wide = m.max(n) > self.base.dims().iter().take(2).copied().max().unwrap_or_default().max(512);
        if rows != m || columns != n || wide || count.is_none_or(|count| count > self.base.elem_count()) {
            let message = format!(
                "`{core}` of shape {:?} with {rows}×{outputs} and {columns}×{inputs} does not fit {:?}",
                part.dims(),
                self.base.dims()
            );
            return Err(self.misfit(message));
        }
        let x = left.t()?.contiguous()?.matmul(&part.reshape((m, n * area))?)?; // [O, N·K·K]
        let x = x.reshape((outputs, n, area))?.transpose(1, 2)?.contiguous()?.reshape((outputs * area, n))?;
        let x = x.matmul(right)?.reshape((outputs, area, inputs))?; // [O, K·K, I]
        Ok((x.transpose(1, 2)?.contiguous()?.reshape((outputs, inputs * area))?, n))
    }

    /// `W + s · scale · change`, or DoRA's decomposition if the file has magnitudes.
    pub(crate) fn change(&self, change: &Tensor, scale: f64) -> Result<Tensor> {
        let (outputs, rest) = self.sides()?;
        let fits = change.elem_count() == self.base.elem_count() && change.dim(0)? == outputs;
        if !fits {
            let message = format!("a change of {:?} does not fit {outputs}×{rest}", change.dims());
            return Err(self.misfit(message));
        }
        let change = change.reshape(self.base.shape())?;
        match dora::magnitude(self)? {
            Some(magnitude) => dora::merge(self, &(self.base + (change * scale)?)?, &magnitude),
            None => Ok((self.base + (change * (self.strength * scale))?)?),
        }
    }
}
