/* Moves the wall clock of a process, and no other clock, by as many seconds as stand in the first eight bytes of the
 * file $WALL_CLOCK_JUMP, whenever they change. Loaded in front of libc (LD_PRELOAD). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *jump;

__attribute__((constructor)) static void map(void) {
    const char *path = getenv("WALL_CLOCK_JUMP");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *jump, PROT_READ, MAP_SHARED, file, 0);
    if (page == MAP_FAILED)
        _exit(97);
    jump = page;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int outcome = (int)syscall(SYS_clock_gettime, clock, now);
    if (outcome == 0 && clock == CLOCK_REALTIME && jump)
        now->tv_sec += *jump;
    return outcome;
}
