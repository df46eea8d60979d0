//! CPU and memory of the host. On Linux, limits of control groups are read as well; figures that a system does not offer
//! are `None`.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use sysinfo::{CpuRefreshKind, MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

use crate::allocator::{self, Usage};
use crate::device::interface::{CpuInfo, HostMemory, ProcessMemory};
use crate::kernels::simd;
use crate::units::Bytes;

/// Instruction sets that the kernels use or could use: `flags` of x86, then `Features` of ARM.
const INSTRUCTION_SETS: &[&str] = &[
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
    "asimd",
    "asimdhp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
];

/// CPU threads that this process may use at once.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

pub(crate) fn cpu() -> CpuInfo {
    let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
    let brand = system.ok().and_then(|system| Some(system.cpus().first()?.brand().trim().to_owned()));
    CpuInfo {
        model: brand.filter(|brand| !brand.is_empty()),
        instruction_sets: instruction_sets(&read_to_string("/proc/cpuinfo").unwrap_or_default()),
        cpu_features: simd::level().name(),
    }
}

/// Known sets among the first CPU's flags.
fn instruction_sets(cpuinfo: &str) -> Vec<String> {
    let value = |wanted: &str| {
        let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.trim() == wanted).map(|(_, value)| value.trim())
    };
    let flags: Vec<&str> = value("flags").or_else(|| value("Features")).unwrap_or_default().split(' ').collect();
    INSTRUCTION_SETS.iter().filter(|set| flags.contains(set)).map(|&set| set.to_owned()).collect()
}

pub(crate) fn memory() -> HostMemory {
    let refresh = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(refresh).ok().filter(|system| system.total_memory() > 0);
    let total = system.as_ref().map(|system| Bytes(system.total_memory()));
    let available = system.as_ref().map(|system| Bytes(system.available_memory()));
    let groups = group_folders(&read_to_string("/proc/self/cgroup").unwrap_or_default(), Path::new("/sys/fs/cgroup"));
    within_limits(total, available, &groups)
}

pub(crate) fn process() -> ProcessMemory {
    let status = read_to_string("/proc/self/status").unwrap_or_default();
    let Usage { mapped, cached: kept, .. } = allocator::usage();
    let line = |key| kib_line(&status, key);
    ProcessMemory {
        rss: line("VmRSS").or_else(resident_set),
        peak_rss: line("VmHWM"),
        anonymous: line("RssAnon"),
        mapped,
        kept,
    }
}

/// Resident bytes of this process on a system without `/proc`.
fn resident_set() -> Option<Bytes> {
    let pid = sysinfo::get_current_pid().ok()?;
    let mut system = System::new().ok()?;
    let refresh = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, refresh);
    system.process(pid).map(|process| Bytes(process.memory()))
}

/// `Key:   123 kB`
fn kib_line(text: &str, key: &str) -> Option<Bytes> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(Bytes(kib.saturating_mul(Bytes::KIB)))
}

/// The machine's memory within the limits of every group in `folders`.
fn within_limits(total: Option<Bytes>, available: Option<Bytes>, folders: &[PathBuf]) -> HostMemory {
    let mut memory = HostMemory { total, available, limited_by_cgroup: false };
    for folder in folders {
        let Some((limit, used)) = group_memory(folder) else { continue };
        // Version 1 writes a missing limit as a number near 2⁶³.
        if memory.total.is_some_and(|total| limit < total) {
            memory.total = Some(limit);
            memory.limited_by_cgroup = true;
        }
        let left = limit.saturating_sub(used);
        memory.available = memory.available.map(|available| available.min(left));
    }
    memory
}

/// Folders that may hold a limit for this process: its own groups and their ancestors, of version 2 (`0::/path`) and
/// version 1 (`4:memory:/path`). Inside a container the path is often the host's, and only the mount's root exists.
fn group_folders(cgroup: &str, mount: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in cgroup.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let base = match controllers {
            "" => mount.to_owned(),
            list if list.split(',').any(|name| name == "memory") => mount.join("memory"),
            _ => continue,
        };
        let relative = Path::new(path.trim_start_matches('/'));
        folders.extend(relative.ancestors().map(|part| base.join(part)));
    }
    folders
}

/// Limit and use; `None` without a limit. Inactive cached files count as free.
fn group_memory(folder: &Path) -> Option<(Bytes, Bytes)> {
    let number = |name: &str| read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?),
        None => (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?),
    };
    let stat = read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cached =
        |key: &str| stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse::<u64>().ok());
    let cached = cached("total_inactive_file").or_else(|| cached("inactive_file")).unwrap_or(0);
    Some((Bytes(limit), Bytes(used.saturating_sub(cached))))
}

#[cfg(test)]
mod tests {
    use super::{Bytes, group_folders, instruction_sets, kib_line, within_limits};

    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    fn check_limit(files: &[(&str, &str)], total: u64, available: u64, limited: bool) {
        let folder = group(files);
        let memory = within_limits(Some(Bytes(1000)), Some(Bytes(900)), &[folder.path().to_owned()]);
        assert_eq!(memory.total, Some(Bytes(total)), "total of {files:?}");
        assert_eq!(memory.available, Some(Bytes(available)), "available of {files:?}");
        assert_eq!(memory.limited_by_cgroup, limited, "{files:?}");
    }

    #[test]
    fn cgroup_limit_reduces_total_and_available() {
        let stat = ("memory.stat", "anon 250\ninactive_file 50\n");
        check_limit(&[("memory.max", "400\n"), ("memory.current", "300\n"), stat], 400, 150, true);
        check_limit(&[("memory.max", "max\n"), ("memory.current", "300\n")], 1000, 900, false);
        check_limit(&[("memory.limit_in_bytes", "500\n"), ("memory.usage_in_bytes", "100\n")], 500, 400, true);
        let none = "9223372036854771712\n";
        check_limit(&[("memory.limit_in_bytes", none), ("memory.usage_in_bytes", "100\n")], 1000, 900, false);
        check_limit(&[], 1000, 900, false);
    }

    #[test]
    fn limits_of_every_ancestor_group_are_read() {
        let mount = std::path::Path::new("/m");
        let folders = group_folders("4:cpu,memory:/a/b\n1:cpu:/x\n0::/c\n", mount);
        let expected = ["/m/memory/a/b", "/m/memory/a", "/m/memory/", "/m/c", "/m/"].map(std::path::PathBuf::from);
        assert_eq!(folders, expected);
    }

    #[test]
    fn proc_files_are_parsed() {
        assert_eq!(kib_line("VmPeak:\t 9 kB\nVmRSS:\t  12 kB\n", "VmRSS"), Some(Bytes(12 * 1024)));
        let sets = instruction_sets("model name\t: A CPU\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n");
        assert_eq!(sets, ["avx2", "avx512_bf16", "amx_bf16"]);
    }
}
