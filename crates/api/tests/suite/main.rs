//! Both ends of a session over a real socket, and file transfers through it.

mod daemon;
mod files;
mod session;
