//! Workers of the model domain.
