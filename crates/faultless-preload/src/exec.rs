//! Functions that execute a program.
//!
//! The strings that they hand the kernel may lie in absent pages; and the environment that they hand on has the library in
//! `LD_PRELOAD`, which must not reach a program that it would break or make say something: one for another C library, another
//! machine, another root directory, or with a sanitizer. Such a program runs unserved, and so does what it starts.
//!
//! All of this happens between `fork` and `execve`, in children of `vfork`, and wherever a program likes: without memory of
//! the heap, and with nothing left behind.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::lend::{GivenWords, filled_through};
use crate::mappings::reaches;
use crate::probe;
use crate::real::{Errno, real};
use crate::state::{self, idle};
use faultless_run::{Fitness, inspect, inspect_open};
use std::ffi::{CStr, c_char, c_int, c_long};
use std::os::unix::ffi::OsStrExt;

/// Longest path, with the zero behind it.
const PATH_MAX: usize = libc::PATH_MAX as usize;
/// Longest `LD_PRELOAD=…` of which a part is kept.
const PRELOAD_MAX: usize = 4096;
/// Longer lists are passed on as they are.
const LIST_MAX: usize = 16 << 10;

unsafe extern "C" {
    static environ: *const *const c_char;
}

/// The C string that an argument points to, if it can be read. Its bytes are read once more by whoever uses it.
fn string<'a>(at: usize) -> Option<&'a CStr> {
    if at == 0 {
        return None;
    }
    let mut end = at;
    loop {
        if (end == at || end.is_multiple_of(faultless_sys::mem::PAGE)) && !probe::readable(end, 1) {
            return None;
        }
        // SAFETY: its page was found to be there.
        if unsafe { (end as *const u8).read() } == 0 {
            // SAFETY: all bytes up to the zero were found to be there.
            return Some(unsafe { CStr::from_ptr(at as *const c_char) });
        }
        end += 1;
    }
}

/// Finds a program as `execvp` does, in the program's own `PATH`.
fn search<'a>(name: &'a CStr, into: &'a mut [u8; PATH_MAX]) -> Option<&'a CStr> {
    if name.to_bytes().contains(&b'/') {
        return Some(name);
    }
    let path = variable(b"PATH=").unwrap_or(b"/bin:/usr/bin");
    for dir in path.split(|&b| b == b':') {
        let parts = [
            if dir.is_empty() { b"." } else { dir },
            b"/",
            name.to_bytes(),
            b"\0",
        ];
        let mut len = 0;
        for part in parts {
            let room = into.get_mut(len..len + part.len())?;
            room.copy_from_slice(part);
            len += part.len();
        }
        // SAFETY: a path that ends with a zero.
        let found = unsafe { libc::access(into.as_ptr().cast(), libc::X_OK) } == 0;
        if found {
            return CStr::from_bytes_until_nul(&into[..len]).ok();
        }
    }
    None
}

/// The value of a variable of the program's own environment, named with its `=`.
fn variable<'a>(name: &[u8]) -> Option<&'a [u8]> {
    // SAFETY: the C library's list of strings, which ends with a null pointer; the program changes it only while it runs alone.
    unsafe {
        let mut at = environ;
        while let Some(&entry) = at.as_ref().filter(|e| !e.is_null()) {
            if let Some(value) = CStr::from_ptr(entry).to_bytes().strip_prefix(name) {
                return Some(value);
            }
            at = at.add(1);
        }
    }
    None
}

/// Whether the library may be in the environment of a program.
fn fit(of: Fitness) -> bool {
    of == Fitness::Fit && library_is_there()
}

/// Whether the library can be read where `LD_PRELOAD` says: not in every root directory.
fn library_is_there() -> bool {
    let Some(settings) = state::settings() else {
        return true;
    };
    let path = settings.library.as_os_str().as_bytes();
    let mut name = [0u8; PATH_MAX];
    let Some(room) = name
        .get_mut(..path.len())
        .filter(|_| path.len() + 1 < PATH_MAX)
    else {
        return false;
    };
    room.copy_from_slice(path);
    // SAFETY: a path that ends with a zero.
    unsafe { libc::access(name.as_ptr().cast(), libc::R_OK) == 0 }
}

/// The two lists of strings that a program starts with.
struct Lists {
    arguments: usize,
    environment: usize,
}

/// The number of strings in a list, if all of it can be read and it is not too long.
fn length(list: usize) -> Option<usize> {
    let mut n = 0;
    loop {
        let at = (list as *const usize).wrapping_add(n);
        if probe::copy(at)? == 0 {
            return Some(n);
        }
        n += 1;
        if n > LIST_MAX {
            return None;
        }
    }
}

/// Makes a call with lists of strings that the kernel can read, and without the library in the environment if the program is not
/// fit for it.
fn with_lists<R>(lists: &Lists, fit: bool, mut call: impl FnMut(&Lists) -> R) -> R {
    // Nothing is absent, and nothing is to be taken out.
    if fit && idle() {
        return call(lists);
    }
    let (Some(arguments), Some(environment)) = (length(lists.arguments), length(lists.environment))
    else {
        return call(lists);
    };
    let most = arguments.max(environment);
    let call: &mut dyn FnMut(&Lists) -> R = &mut call;
    match most {
        0..128 => copied::<128, R>(lists, fit, call),
        128..2048 => copied::<2048, R>(lists, fit, call),
        _ => copied::<{ LIST_MAX + 1 }, R>(lists, fit, call),
    }
}

/// The same, with room for `N` strings in each list on the stack.
#[inline(never)]
fn copied<const N: usize, R>(lists: &Lists, fit: bool, call: &mut dyn FnMut(&Lists) -> R) -> R {
    let mut preload = [0u8; PRELOAD_MAX];
    let (mut arguments, mut environment) = ([0usize; N], [0usize; N]);
    fill(lists.arguments, &mut arguments, Some);
    fill(lists.environment, &mut environment, |string| {
        if fit {
            Some(string)
        } else {
            without_library(string, &mut preload)
        }
    });
    // The kernel reads absent strings through its own mapping. (Most lists have none.)
    let given = [
        GivenList::of(&mut arguments),
        GivenList::of(&mut environment),
    ];
    let result = call(&Lists {
        arguments: arguments.as_ptr() as usize,
        environment: environment.as_ptr() as usize,
    });
    drop(given);
    result
}

/// Copies a list that ends with a null pointer, which was found to be readable and short enough.
fn fill<const N: usize>(
    list: usize,
    into: &mut [usize; N],
    mut change: impl FnMut(usize) -> Option<usize>,
) {
    let mut n = 0;
    for i in 0..N - 1 {
        match probe::copy((list as *const usize).wrapping_add(i)) {
            None | Some(0) => return,
            Some(string) => {
                if let Some(string) = change(string) {
                    into[n] = string;
                    n += 1;
                }
            }
        }
    }
}

/// Mappings of strings in a list that lie in mappings of ours.
const LENT_MAX: usize = 16;

/// A list whose strings the kernel can read.
struct GivenList {
    _lent: [Option<GivenWords<1>>; LENT_MAX],
}

impl GivenList {
    fn of(list: &mut [usize]) -> Self {
        let mut lent = [const { None }; LENT_MAX];
        let mut n = 0;
        for string in list.iter_mut().take_while(|s| **s != 0) {
            if n < LENT_MAX
                && reaches(&(*string..string.saturating_add(1)))
                && let Some(given) = GivenWords::new([*string])
            {
                *string = given.words[0];
                lent[n] = Some(given);
                n += 1;
            }
        }
        GivenList { _lent: lent }
    }
}

/// A variable as an unfit program is to find it: the settings are gone, and so is the library from `LD_PRELOAD`.
fn without_library(entry: usize, into: &mut [u8; PRELOAD_MAX]) -> Option<usize> {
    const NAME: &[u8] = b"LD_PRELOAD=";
    if probe::begins(entry, b"FAULTLESS_RUN=") {
        return None;
    }
    if !probe::begins(entry, NAME) {
        return Some(entry);
    }
    let library = state::settings()?.library.as_os_str().as_bytes();
    let value = string(entry)?.to_bytes().strip_prefix(NAME)?;
    let mut len = NAME.len();
    into.fill(0);
    into[..len].copy_from_slice(NAME);
    for part in value.split(|&b| b == b':' || b == b' ') {
        if part == library || part.is_empty() {
            continue;
        }
        let separator = usize::from(len > NAME.len());
        // (Room for the zero behind it.)
        let room = into.get_mut(len..len + separator + part.len() + 1)?;
        room[..separator].fill(b':');
        room[separator..separator + part.len()].copy_from_slice(part);
        len += separator + part.len();
    }
    (len > NAME.len()).then_some(into.as_ptr() as usize)
}

/// Makes a call that starts a program, which is given its path or name and its lists as the kernel can read them, and without the
/// library where the program is not fit for it.
fn start(
    path: usize,
    lists: &Lists,
    fitness: impl FnOnce(&CStr) -> Fitness,
    call: impl Fn(usize, &Lists) -> c_int,
) -> c_int {
    if !state::on() {
        return call(path, lists);
    }
    let fit = {
        let _errno = Errno::keep();
        string(path).is_none_or(|path| fit(fitness(path)))
    };
    let given = GivenWords::new([path]);
    let path = given.as_ref().map_or(path, |g| g.words[0]);
    with_lists(lists, fit, |lists| call(path, lists))
}

/// The same, where the program takes this one's place.
fn execute(
    path: usize,
    lists: &Lists,
    fitness: impl FnOnce(&CStr) -> Fitness,
    call: impl Fn(usize, &Lists) -> c_int,
) -> c_int {
    last_words();
    start(path, lists, fitness, call)
}

/// Reports what this process did, if it is served and about to become another program.
fn last_words() {
    if state::on() && !state::foreign() {
        state::end("exec");
    }
}

/// What `environ` is now.
fn own_environment() -> usize {
    // SAFETY: the C library's variable.
    unsafe { environ as usize }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn execve(
    path: usize,
    arguments: usize,
    environment: usize,
) -> c_int {
    type Call = unsafe extern "C-unwind" fn(usize, usize, usize) -> c_int;
    let lists = Lists {
        arguments,
        environment,
    };
    // SAFETY: the program's own arguments, or copies.
    execute(path, &lists, inspect, |path, lists| unsafe {
        real!(execve as Call)(path, lists.arguments, lists.environment)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn execv(path: usize, arguments: usize) -> c_int {
    // SAFETY: the program's own arguments.
    unsafe { execve(path, arguments, own_environment()) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn execvpe(name: usize, arguments: usize, environment: usize) -> c_int {
    type Call = unsafe extern "C-unwind" fn(usize, usize, usize) -> c_int;
    let lists = Lists {
        arguments,
        environment,
    };
    // SAFETY: the program's own arguments, or copies.
    execute(name, &lists, inspect_named, |name, lists| unsafe {
        real!(execvpe as Call)(name, lists.arguments, lists.environment)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn execvp(name: usize, arguments: usize) -> c_int {
    // SAFETY: the program's own arguments.
    unsafe { execvpe(name, arguments, own_environment()) }
}

/// A file that the C library hands to a shell counts as what the shell is.
fn inspect_named(name: &CStr) -> Fitness {
    let mut path = [0; PATH_MAX];
    search(name, &mut path).map_or(Fitness::Fit, inspect)
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn fexecve(fd: c_int, arguments: usize, environment: usize) -> c_int {
    type Call = unsafe extern "C-unwind" fn(c_int, usize, usize) -> c_int;
    let lists = Lists {
        arguments,
        environment,
    };
    // SAFETY: the program's own arguments, or copies.
    let call =
        |lists: &Lists| unsafe { real!(fexecve as Call)(fd, lists.arguments, lists.environment) };
    if !state::on() {
        return call(&lists);
    }
    last_words();
    with_lists(&lists, fit(inspect_open(fd)), call)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn execveat(
    dir: c_int,
    path: usize,
    arguments: usize,
    environment: usize,
    flags: c_int,
) -> c_int {
    type Call = unsafe extern "C-unwind" fn(c_int, usize, usize, usize, c_int) -> c_int;
    let lists = Lists {
        arguments,
        environment,
    };
    let inspect = |path: &CStr| match (path.is_empty(), path.to_bytes().starts_with(b"/")) {
        (true, _) => inspect_open(dir),
        (_, true) => inspect(path),
        _ if dir == libc::AT_FDCWD => inspect(path),
        _ => {
            let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
            // SAFETY: a path that ends with a zero; the descriptor is our own.
            unsafe {
                let fd = libc::openat(dir, path.as_ptr(), flags);
                let found = inspect_open(fd);
                faultless_sys::file::close(fd);
                found
            }
        }
    };
    // SAFETY: the program's own arguments, or copies.
    execute(path, &lists, inspect, |path, lists| unsafe {
        real!(execveat as Call)(dir, path, lists.arguments, lists.environment, flags)
    })
}

macro_rules! spawns {
    ($($name:ident: $inspect:expr;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(pid: usize, path: usize, actions: usize, attributes: usize, arguments: usize, environment: usize) -> c_int {
            type Call = unsafe extern "C-unwind" fn(usize, usize, usize, usize, usize, usize) -> c_int;
            let real = real!($name as Call);
            // SAFETY: the program's own arguments, or copies.
            let call = |path, lists: &Lists| unsafe {
                real(pid, path, actions, attributes, lists.arguments, lists.environment)
            };
            // (The C library stores the number with all signals blocked, where no handler can serve it.)
            filled_through(&[pid]);
            let lists = Lists { arguments, environment };
            start(path, &lists, $inspect, call)
        }
    )* };
}
spawns! {
    posix_spawn: inspect;
    posix_spawnp: inspect_named;
}

/// A command that a shell reads: the C library passes its address on to the shell's `execve`.
macro_rules! commands {
    ($($name:ident($($more:ident)?) -> $kind:ty;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(command: usize $(, $more: usize)?) -> $kind {
            let given = GivenWords::new([command $(, $more)?]);
            let words = given.as_ref().map_or([command $(, $more)?], |g| g.words);
            let [command $(, $more)?] = words;
            type Call = unsafe extern "C-unwind" fn(usize $(, commands!(@word $more))?) -> $kind;
            // SAFETY: the program's own arguments, or other addresses of the same strings.
            unsafe { real!($name as Call)(command $(, $more)?) }
        }
    )* };
    (@word $arg:ident) => { usize };
}
commands! {
    system() -> c_int;
    popen(mode) -> usize;
}

// `execl`, `execlp` and `execle` collect their arguments in exec.c and come here.

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn faultless_execv(
    path: usize,
    arguments: usize,
    environment: usize,
) -> c_int {
    // SAFETY: the program's own arguments, in a list.
    unsafe { execve(path, arguments, environment) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn faultless_execvp(name: usize, arguments: usize) -> c_int {
    // SAFETY: the program's own arguments, in a list.
    unsafe { execvp(name, arguments) }
}

/// The C library's `syscall` with the number of `execve`, whose path is looked at as `execve` looks at it.
pub(crate) fn by_number(nr: c_long, [a, b, c, d, e, _]: [usize; 6]) -> c_long {
    // SAFETY: the same call by another name, with the same arguments.
    let result = unsafe {
        match nr {
            libc::SYS_execve => execve(a, b, c),
            _ => execveat(a as c_int, b, c, d, e as c_int),
        }
    };
    c_long::from(result)
}
