//! Statistics of group norms, so that a feature map can be normalised in parts.

/// Statistics over positions of one sample, for each channel.
#[derive(Clone, Debug)]
pub struct RunningStats {
    /// Count of positions.
    pub count: f64,
    /// `[C]`
    pub mean: Vec<f64>,
    /// Sum of squared distances to the mean; `[C]`
    pub spread: Vec<f64>,
}

/// Mean and reciprocal deviation of one group of channels.
pub struct GroupStats {
    pub mean: f64,
    pub normal: f64,
}

impl RunningStats {
    /// Adds the positions of `other`, which has as many channels (Chan et al., 1979).
    pub fn merge(&mut self, other: &Self) {
        let count = self.count + other.count;
        if count > 0.0 {
            for (c, (mean, spread)) in self.mean.iter_mut().zip(&mut self.spread).enumerate() {
                let distance = other.mean[c] - *mean;
                *spread += other.spread[c] + distance * distance * self.count * other.count / count;
                *mean += distance * other.count / count;
            }
        }
        self.count = count;
    }

    /// Statistics of each group, in order; `groups` divides the channels.
    pub fn groups(&self, groups: usize, eps: f64) -> Vec<GroupStats> {
        let size = self.mean.len() / groups;
        let group = |(mean, spread): (&[f64], &[f64])| {
            let middle = mean.iter().sum::<f64>() / size as f64;
            // Each channel's own variance, and its distance to the mean of the group.
            let one = |(mean, spread): (&f64, &f64)| spread / self.count + (mean - middle) * (mean - middle);
            let variance = mean.iter().zip(spread).map(one).sum::<f64>() / size as f64;
            GroupStats { mean: middle, normal: 1.0 / (variance.max(0.0) + eps).sqrt() }
        };
        self.mean.chunks_exact(size).zip(self.spread.chunks_exact(size)).map(group).collect()
    }
}
