//! Every manager as a plain field.
