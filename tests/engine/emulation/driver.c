// Runs kernels of a library for a process that cannot load it. It may run in an emulator.
//
// Commands come through the standard input, numbers are int64:
//   W offset size bytes            writes into the memory
//   R offset size                  answers with bytes of the memory
//   C length name a[8]             calls a function of the library, answers with its result
// The first answer is the address of the memory.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { MEMORY_BYTES = 256 * 1024 * 1024, MAX_NAME = 100, NUM_ARGUMENTS = 8 };

typedef int64_t (*function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

static void fail(const char *why) {
    fprintf(stderr, "%s\n", why);
    exit(1);
}

static void read_bytes(void *to, int64_t size) {
    if (size > 0 && fread(to, size, 1, stdin) != 1) fail("the input ends within a command");
}

static int64_t read_number(void) {
    int64_t number;
    read_bytes(&number, sizeof number);
    return number;
}

static void answer(const void *from, int64_t size) {
    if (size > 0 && fwrite(from, size, 1, stdout) != 1) fail("the answer cannot be written");
    fflush(stdout);
}

static char *read_place(char *memory, int64_t *size) {
    int64_t offset = read_number();
    *size = read_number();
    if (offset < 0 || *size < 0 || offset + *size > MEMORY_BYTES) fail("not within the memory");
    return memory + offset;
}

static void call(void *library) {
    char name[MAX_NAME + 1] = {0};
    int64_t length = read_number(), a[NUM_ARGUMENTS];
    if (length < 0 || length > MAX_NAME) fail("the name is too long");
    read_bytes(name, length);
    read_bytes(a, sizeof a);
    function f = (function)dlsym(library, name);
    if (f == NULL) fail(dlerror());
    int64_t result = f(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
    answer(&result, sizeof result);
}

int main(int count, char **arguments) {
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (library == NULL) fail(count == 2 ? dlerror() : "give a library");
    char *memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory");
    answer(&memory, sizeof memory);
    for (int command; (command = getchar()) != EOF;) {
        int64_t size;
        if (command == 'C') {
            call(library);
            continue;
        }
        char *place = read_place(memory, &size);
        if (command == 'W')
            read_bytes(place, size);
        else if (command == 'R')
            answer(place, size);
        else
            fail("not a command");
    }
    return 0;
}
