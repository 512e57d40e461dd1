/* SPDX-License-Identifier: Apache-2.0
 *
 * A plugin for qemu user mode that counts the guest's executed instructions. Each sched_yield of the guest writes the
 * count so far, in decimal, on a line of its own into the file named by the argument `out=FILE`; a last line, "end",
 * says that the file is complete. The worker yields before and after an inference, so the difference of two lines is
 * what the inference took.
 *
 *     cc -shared -fPIC -O2 -o count.so count_instructions.c
 *     qemu-aarch64 -plugin count.so,out=counts.txt -cpu cortex-a53 PROGRAM
 *
 * The part of the plugin interface (version 1, qemu 7.2) that is needed is declared here, so that no header of qemu
 * has to be installed. The count is shared by all threads without a lock: it is exact for a guest with one thread.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t plugin_id;
struct qemu_plugin_tb;

enum { INLINE_ADD_U64 = 0 };

typedef void (*on_translation)(plugin_id, struct qemu_plugin_tb *);
typedef void (*on_syscall)(plugin_id, unsigned int vcpu, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t,
                           uint64_t, uint64_t, uint64_t, uint64_t);
typedef void (*on_exit)(plugin_id, void *);

extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, on_translation);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id, on_syscall);
extern void qemu_plugin_register_atexit_cb(plugin_id, on_exit, void *);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int operation, void *, uint64_t);

EXPORT int qemu_plugin_version = 1;

/* sched_yield in the system call table that all newer architectures share, aarch64 among them */
static const int64_t SCHED_YIELD = 124;

static uint64_t executed;
static FILE *out;

static void add_block(plugin_id id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, INLINE_ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

static void write_mark(plugin_id id, unsigned int vcpu, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                       uint64_t e, uint64_t f, uint64_t g, uint64_t h)
{
    (void)id, (void)vcpu, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number == SCHED_YIELD)
        fprintf(out, "%llu\n", (unsigned long long)executed);
}

static void finish(plugin_id id, void *unused)
{
    (void)id, (void)unused;
    fputs("end\n", out);
    fclose(out);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    (void)info;
    for (int i = 0; i < argc; i++)
        if (!strncmp(argv[i], "out=", 4))
            out = fopen(argv[i] + 4, "w");
    if (!out) {
        fputs("count_instructions: out=FILE is missing or cannot be written\n", stderr);
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, add_block);
    qemu_plugin_register_vcpu_syscall_cb(id, write_mark);
    qemu_plugin_register_atexit_cb(id, finish, NULL);
    return 0;
}
