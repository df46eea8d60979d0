//! Shape rules of every kernel, checked once before any implementation runs. Functions return the shape of the result.

use candle_core::{Result, Tensor, bail};

use crate::kernels::conv_shape::{ConvShape, Padding};
use crate::kernels::epilogue::Epilogue;

fn epilogue(out: &[usize], bias: Option<&Tensor>, epilogue: Epilogue) -> Result<()> {
    let outputs = out.last().copied().unwrap_or(0);
    if let Some(bias) = bias
        && bias.dims() != [outputs]
    {
        bail!("the bias must be [{outputs}], got {:?}", bias.dims());
    }
    if let Some(per_sample) = epilogue.per_sample {
        let batch = if out.len() > 1 { out[0] } else { 1 };
        if per_sample.dims() != [batch, outputs] {
            bail!("`per_sample` must be [{batch}, {outputs}], got {:?}", per_sample.dims());
        }
    }
    if let Some(residual) = epilogue.residual
        && residual.dims() != out
    {
        bail!("`residual` must have the result's shape {out:?}, got {:?}", residual.dims());
    }
    Ok(())
}

pub(crate) fn linear(
    x: &Tensor,
    (outputs, inputs): (usize, usize),
    bias: Option<&Tensor>,
    after: Epilogue,
) -> Result<Vec<usize>> {
    let mut out = x.dims().to_vec();
    match out.last_mut() {
        Some(last) if *last == inputs => *last = outputs,
        _ => bail!("a linear layer of {inputs} inputs wants [.., {inputs}], got {:?}", x.dims()),
    }
    epilogue(&out, bias, after)?;
    Ok(out)
}

pub(crate) fn geglu(x: &Tensor, size: (usize, usize), bias: Option<&Tensor>) -> Result<Vec<usize>> {
    let mut out = linear(x, size, bias, Epilogue::default())?;
    match out.last_mut() {
        Some(last) if *last % 2 == 0 => *last /= 2,
        _ => bail!("a gated layer needs an even number of outputs, got {}", size.0),
    }
    Ok(out)
}

/// The kernel in the layout of files.
pub(crate) fn kernel(weight: &[usize], shape: ConvShape) -> Result<()> {
    let ConvShape { inputs, outputs, kernel, .. } = shape;
    if weight != [outputs, inputs, kernel, kernel] {
        bail!("the kernel must be [{outputs}, {inputs}, {kernel}, {kernel}], got {weight:?}");
    }
    Ok(())
}

pub(crate) fn conv2d(x: &Tensor, bias: Option<&Tensor>, shape: ConvShape, after: Epilogue) -> Result<Vec<usize>> {
    let ConvShape { inputs, outputs, kernel, stride, padding: Padding { top, bottom, left, right } } = shape;
    if kernel == 0 || stride == 0 {
        bail!("a convolution needs a kernel and a stride of at least 1, got kernel {kernel}, stride {stride}");
    }
    let (batch, height, width, channels) = x.dims4()?;
    if channels != inputs {
        bail!("a convolution of {inputs} channels wants [B, H, W, {inputs}], got {:?}", x.dims());
    }
    let (rows, columns) = (height + top + bottom, width + left + right);
    if rows < kernel || columns < kernel {
        bail!("a {kernel}×{kernel} kernel does not fit {rows}×{columns} positions, padding included");
    }
    let out = vec![batch, (rows - kernel) / stride + 1, (columns - kernel) / stride + 1, outputs];
    epilogue(&out, bias, after)?;
    Ok(out)
}

pub(crate) fn norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize) -> Result<()> {
    let channels = x.dims().last().copied().unwrap_or(0);
    if weight.dims() != [channels] || bias.dims() != [channels] {
        bail!("a norm of {:?} channels wants [.., {:?}], got {:?}", weight.dims(), weight.dims(), x.dims());
    }
    if groups == 0 || channels % groups != 0 {
        bail!("{channels} channels cannot be split into {groups} groups");
    }
    Ok(())
}

pub(crate) fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, groups: usize) -> Result<()> {
    if x.rank() < 2 {
        bail!("a group norm wants [B, .., C], got {:?}", x.dims());
    }
    norm(x, weight, bias, groups)
}

pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Vec<usize>> {
    let (batch, _, channels) = q.dims3()?;
    let (key_batch, _, key_channels) = k.dims3()?;
    if key_batch != batch || key_channels != channels || v.dims() != k.dims() {
        bail!("attention wants q [B, Lq, C] and k, v [B, Lk, C], got {:?}, {:?}, {:?}", q.dims(), k.dims(), v.dims());
    }
    if heads == 0 || channels % heads != 0 {
        bail!("{channels} channels cannot be split into {heads} heads");
    }
    Ok(q.dims().to_vec())
}

pub(crate) fn upsample(x: &Tensor, height: usize, width: usize) -> Result<Vec<usize>> {
    let (batch, rows, columns, channels) = x.dims4()?;
    if rows * columns == 0 && height * width != 0 {
        bail!("a feature map of {rows}×{columns} cannot be scaled to {height}×{width}");
    }
    Ok(vec![batch, height, width, channels])
}

pub(crate) fn concat(a: &Tensor, b: &Tensor) -> Result<Vec<usize>> {
    let (Some((last_a, front_a)), Some((last_b, front_b))) = (a.dims().split_last(), b.dims().split_last()) else {
        bail!("scalars have no channels to join");
    };
    if front_a != front_b || a.dtype() != b.dtype() {
        bail!(
            "only maps of one size and dtype can be joined, got {:?} {:?} and {:?} {:?}",
            a.dims(),
            a.dtype(),
            b.dims(),
            b.dtype()
        );
    }
    let mut out = front_a.to_vec();
    out.push(last_a + last_b);
    Ok(out)
}

/// True if a tensor of this shape has no elements.
pub(crate) fn is_empty(shape: &[usize]) -> bool {
    shape.contains(&0)
}
