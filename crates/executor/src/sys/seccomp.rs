//! Installing a system call filter.

use std::io;

use super::check;

/// One instruction of classic BPF.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SockFilter {
    pub(crate) code: u16,
    pub(crate) jump_true: u8,
    pub(crate) jump_false: u8,
    pub(crate) value: u32,
}

#[repr(C)]
struct SockProgram {
    len: libc::c_ushort,
    filter: *const SockFilter,
}

/// Filters this process' system calls from now on. Needs `CAP_SYS_ADMIN` or no-new-privileges.
pub(crate) fn install_seccomp(filter: &[SockFilter]) -> io::Result<()> {
    let len =
        libc::c_ushort::try_from(filter.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let program = SockProgram {
        len,
        filter: filter.as_ptr(),
    };
    // SAFETY: the program describes `filter`, which outlives the call; the kernel copies and verifies it.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    })
    .map(drop)
}
