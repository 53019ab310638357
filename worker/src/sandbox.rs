//! Fewer privileges for a process that is about to read what strangers made.
//!
//! ```text
//!  what the kernel has      what is then refused, in this process and for good
//!  no_new_privs             privileges by set-uid programs and file capabilities
//!  Landlock                 writing, making and removing files anywhere but in the places named; starting programs
//!  seccomp                  system calls that no transfer needs: EPERM
//!  limits                   address space, CPU time; core dumps, as memory may hold credentials
//! ```
//!
//! Our parsers are safe Rust, so this is the second fence: for a decompressor in C, for the day one of us is wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, AccessFs, BitFlags, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter_all_threads};

/// The newest version of Landlock whose rights are asked for; an older kernel refuses less.
const LANDLOCK_ABI: ABI = ABI::V5;

/// System calls that change the machine, look into other processes, or are seldom used and often attacked.
const REFUSED_CALLS: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_init_module,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// What a process may still do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// Files and directories it may write to, make and remove files in; those that are not there are passed over.
    pub writable: Vec<PathBuf>,
    /// Most address space, bytes; as much as before if `None`.
    pub address_space_bytes_max: Option<u64>,
    /// Most CPU time, seconds; as much as before if `None`.
    pub cpu_seconds_max: Option<u64>,
}

/// What the kernel took on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entered {
    /// Whether writes are confined.
    pub landlock: bool,
    /// Whether system calls are refused.
    pub seccomp: bool,
}

/// Why the process could not be confined though the kernel can.
#[derive(Debug)]
pub struct Error {
    what: &'static str,
    cause: Box<dyn std::error::Error + Send + Sync>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the sandbox cannot be entered: {}", self.what)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.cause)
    }
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |cause| Error { what, cause: cause.into() }
}

impl Sandbox {
    /// Confines this process. To be called before it has other threads, which Landlock would leave alone.
    ///
    /// # Errors
    /// When the kernel has what is asked for and refuses it. What it does not have is left out and told by the answer.
    pub fn enter(&self) -> Result<Entered, Error> {
        rustix::thread::set_no_new_privs(true).map_err(failed("no new privileges"))?;
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("no dumps"))?;
        limit(Resource::Core, Some(0)).map_err(failed("no core dumps"))?;
        limit(Resource::As, self.address_space_bytes_max).map_err(failed("the limit of memory"))?;
        limit(Resource::Cpu, self.cpu_seconds_max).map_err(failed("the limit of CPU time"))?;
        let landlock = self.confine_writes().map_err(failed("confining writes"))?;
        let seccomp = refuse_calls()?;
        Ok(Entered { landlock, seccomp })
    }

    fn confine_writes(&self) -> Result<bool, landlock::RulesetError> {
        let write = AccessFs::from_write(LANDLOCK_ABI);
        let handled: BitFlags<AccessFs> = write | AccessFs::Execute;
        let writable = self.writable.iter().map(PathBuf::as_path).chain([Path::new("/dev/null")]);
        let status = Ruleset::default()
            .handle_access(handled)?
            .create()?
            .add_rules(path_beneath_rules(writable, write))?
            .restrict_self()?;
        Ok(status.ruleset != RulesetStatus::NotEnforced)
    }
}

/// Lowers a limit; one that is lower already stays.
fn limit(resource: Resource, most: Option<u64>) -> rustix::io::Result<()> {
    let Some(most) = most else { return Ok(()) };
    let before = getrlimit(resource);
    let lower = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
    setrlimit(resource, Rlimit { current: lower(before.current), maximum: lower(before.maximum) })
}

/// Answers [`REFUSED_CALLS`] with EPERM; false where the machine's architecture is not known to the filter.
fn refuse_calls() -> Result<bool, Error> {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(false) };
    let rules: BTreeMap<_, _> = REFUSED_CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch);
    let program: BpfProgram =
        filter.and_then(TryInto::try_into).map_err(failed("making the filter of system calls"))?;
    apply_filter_all_threads(&program).map_err(failed("filtering system calls"))?;
    Ok(true)
}
