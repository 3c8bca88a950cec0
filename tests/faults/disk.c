/* Watches, fails or kills at the calls that change files below one folder. Preloaded: see disk.py.

   Calls are counted from 1. At call `kill_at` the process dies before it happens; at each call from `fail_at` on whose
   letter is in `fail_kinds` it fails with `fail_errno` instead (`fail_once`: at the first only). With a log, each call
   that succeeded is written down with what power.py needs to build the disk again. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX], fail_kinds[32];
static long count, kill_at, fail_at;
static int fail_errno, fail_once, log_fd = -1;

void disk_begin(const char *folder, long kill, long fail, int number, const char *kinds, int once, const char *log) {
    snprintf(root, sizeof root, "%s", folder);
    snprintf(fail_kinds, sizeof fail_kinds, "%s", kinds);
    count = 0, kill_at = kill, fail_at = fail, fail_errno = number, fail_once = once;
    log_fd = *log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0666) : -1;
}

long disk_count(void) { return count; }

static int below(const char *path) {
    size_t n = strlen(root);
    return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

/* The absolute path of a file, "" if it is not below the root. */
static const char *absolute(int at, const char *path, char *out) {
    char base[PATH_MAX] = "";
    if (!root[0]) return "";
    if (path[0] != '/') {
        if (at == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return "";
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", at);
            ssize_t n = readlink(link, base, sizeof base - 1);
            base[n < 0 ? 0 : n] = 0;
        }
    }
    if (snprintf(out, PATH_MAX, "%s%s%s", base, *base ? "/" : "", path) >= PATH_MAX) return "";
    return below(out) ? out : "";
}

static int ours(int fd) {
    char link[64], path[PATH_MAX];
    if (!root[0] || fd < 0 || fd == log_fd) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Count a call; return whether it must fail. */
static int meets(char kind) {
    count++;
    if (count == kill_at) kill(getpid(), SIGKILL);
    if (fail_at && count >= fail_at && strchr(fail_kinds, kind)) {
        if (fail_once) fail_at = 0;
        errno = fail_errno;
        return 1;
    }
    return 0;
}

static void note(char kind, unsigned long inode, long offset, const char *one, const char *two, const void *data, size_t size) {
    if (log_fd < 0) return;
    int saved = errno;
    char head[160];
    int n = snprintf(head, sizeof head, "%c %lu %ld %zu %zu %zu\n", kind, inode, offset, strlen(one), strlen(two), size);
    struct iovec parts[] = {{head, n}, {(void *)one, strlen(one)}, {(void *)two, strlen(two)}, {(void *)data, size}};
    syscall(SYS_writev, log_fd, parts, 4);
    errno = saved;
}

static unsigned long inode_of(int fd) {
    struct stat st;
    return fstat(fd, &st) ? 0 : st.st_ino;
}


static int real_openat(int at, const char *path, int flags, mode_t mode) {
    return syscall(SYS_openat, at, path, flags | O_LARGEFILE, mode);
}

static int opened(int at, const char *path, int flags, mode_t mode) {
    char out[PATH_MAX];
    const char *full = absolute(at, path, out);
    int nameless = (flags & O_TMPFILE) == O_TMPFILE;
    struct stat st;
    int makes = nameless || ((flags & O_CREAT) && lstat(full, &st));
    if (!*full || !(makes || (flags & O_TRUNC))) return real_openat(at, path, flags, mode);
    if (meets('O')) return -1;
    int fd = real_openat(at, path, flags, mode);
    if (fd >= 0) note(makes ? 'N' : 'T', inode_of(fd), 0, nameless ? "" : full, "", "", 0);
    return fd;
}

#define MODE va_list list; va_start(list, flags); mode_t mode = va_arg(list, int); va_end(list)
int open(const char *path, int flags, ...) { MODE; return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE; return opened(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE; return opened(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE; return opened(at, path, flags, mode); }

ssize_t write(int fd, const void *data, size_t size) {
    if (!ours(fd)) return syscall(SYS_write, fd, data, size);
    if (meets('W')) return -1;
    long at = (fcntl(fd, F_GETFL) & O_APPEND) ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
    ssize_t n = syscall(SYS_write, fd, data, size);
    if (n > 0) note('W', inode_of(fd), at, "", "", data, n);
    return n;
}

static int synced(int number, int fd) {
    if (!ours(fd)) return syscall(number, fd);
    if (meets('S')) return -1;
    int done = syscall(number, fd);
    char link[64], path[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    struct stat st;
    fstat(fd, &st);
    if (!done) note('S', st.st_ino, S_ISDIR(st.st_mode), path, "", "", 0);
    return done;
}
int fsync(int fd) { return synced(SYS_fsync, fd); }
int fdatasync(int fd) { return synced(SYS_fdatasync, fd); }

int ftruncate(int fd, off_t size) {
    if (!ours(fd)) return syscall(SYS_ftruncate, fd, size);
    if (meets('W')) return -1;
    int done = syscall(SYS_ftruncate, fd, size);
    if (!done) note('T', inode_of(fd), size, "", "", "", 0);
    return done;
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

static int named(char kind, int at, const char *one, int to, const char *two, int flags) {
    char out1[PATH_MAX], out2[PATH_MAX];
    const char *full1 = one ? absolute(at, one, out1) : "", *full2 = two ? absolute(to, two, out2) : "";
    int is_ours = *full1 || *full2;
    if (is_ours && meets(kind)) return -1;
    int done = -1;
    switch (kind) {
    case 'R': done = syscall(SYS_renameat, at, one, to, two); break;
    case 'L': done = syscall(SYS_linkat, at, one, to, two, flags); break;
    case 'U': done = syscall(SYS_unlinkat, at, one, flags); break;
    case 'M': done = syscall(SYS_mkdirat, at, one, flags); break;
    case 'Y': done = syscall(SYS_symlinkat, one, to, two); break;
    }
    if (is_ours && !done) {
        struct stat st = {0};
        if (kind == 'L' || kind == 'R') lstat(full2, &st);
        if (kind == 'U' && (flags & AT_REMOVEDIR)) kind = 'D';
        note(kind, st.st_ino, 0, kind == 'Y' ? one : full1, full2, "", 0);
    }
    return done;
}
int rename(const char *a, const char *b) { return named('R', AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int x, const char *a, int y, const char *b) { return named('R', x, a, y, b, 0); }
int link(const char *a, const char *b) { return named('L', AT_FDCWD, a, AT_FDCWD, b, 0); }
int linkat(int x, const char *a, int y, const char *b, int flags) { return named('L', x, a, y, b, flags); }
int unlink(const char *a) { return named('U', AT_FDCWD, a, 0, NULL, 0); }
int unlinkat(int x, const char *a, int flags) { return named('U', x, a, 0, NULL, flags); }
int rmdir(const char *a) { return named('U', AT_FDCWD, a, 0, NULL, AT_REMOVEDIR); }
int mkdir(const char *a, mode_t mode) { return named('M', AT_FDCWD, a, 0, NULL, mode); }
int mkdirat(int x, const char *a, mode_t mode) { return named('M', x, a, 0, NULL, mode); }
int symlink(const char *a, const char *b) { return named('Y', AT_FDCWD, a, AT_FDCWD, b, 0); }
int symlinkat(const char *a, int y, const char *b) { return named('Y', AT_FDCWD, a, y, b, 0); }
