//! What the model is: its configuration, and from there its parts.

pub mod config;
