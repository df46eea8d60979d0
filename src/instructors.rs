//! The one match over domains.
