"""Remove a line that keeps a promise, and see that a test fails: `python -m tests.attacks.mutations`.

Each mutation is made in a copy of the checkout, which then runs the tests that should fail. If they all pass, the tests
have a gap, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import builtins
import os
import re
import shlex
import shutil
import subprocess
import symtable
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.support import leftovers

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 600
POWER_CUTS = "400"  # states of each scenario; with fewer, no state may notice the mutation


class Mutation(NamedTuple):
    """A protection in the code, and its removal."""

    what: str  # the behaviour that the line ensures
    file: str
    line: str  # text that must occur exactly once in the file
    without: str  # the text that replaces it
    tests: str  # pytest's arguments: the tests of which one should fail


POWER = "tests/attacks/test_powercuts.py"
MUTATIONS = [
    # Blobs
    Mutation("a blob's content is verified", "cachedb/disk/writer.py", "if digest is not None and actual != digest:", "if False:", "tests/content/test_publish.py"),
    Mutation("content is synced before it gets its name", "cachedb/disk/writer.py", "                os.fsync(target)\n", "", POWER),
    Mutation("a checker may refuse a blob after its last byte", "cachedb/disk/writer.py", "    while not free.empty():\n        finished(free.get())\n", "", "tests/content/test_publish.py"),
    Mutation("a checker may refuse a blob while it is written", "cachedb/disk/writer.py", "        if isinstance(chunk, BaseException):\n            raise chunk\n", "", "tests/content/test_publish.py"),
    Mutation("the record in ingest/ is synced before blobs/ changes", "cachedb/content/publish.py", "            os.fsync(received_in)\n", "            pass\n", POWER),
    Mutation("names in blobs/ are synced before their rows are committed", "cachedb/content/publish.py", "                for folder in folders.values():\n                    os.fsync(folder)\n", "", POWER),
    Mutation("a failed publication is retracted", "cachedb/content/publish.py", "            retract(database, received_in, [path.name for path in files])\n", "            pass\n", "tests/content/test_publish.py tests/test_cache.py"),
    Mutation("only blobs that are not stored are published", "cachedb/content/publish.py", "known = find_intact(connection, database.directory, [blob.digest for blob in files.values()])", "known = {}", "tests/content/test_publish.py tests/attacks/test_interleavings.py"),
    Mutation("a damaged file is replaced", "cachedb/content/publish.py", "known = find_intact(connection, database.directory, [blob.digest for blob in files.values()])", "known = read_stored_sizes(connection, [blob.digest for blob in files.values()])", "tests/content/test_publish.py tests/test_cache.py"),
    Mutation("a retraction is synced", "cachedb/content/publish.py", "                for opened_folder in folders.values():\n                    os.fsync(opened_folder)\n", "", POWER),
    Mutation("a retraction keeps stored blobs", "cachedb/content/publish.py", "            known = read_stored_sizes(connection, published.values())\n", "            known = {}\n", "tests/content/test_publish.py tests/content/test_session.py tests/content/test_collect.py tests/attacks/test_crashes.py"),
    # Foreign files and folders
    Mutation("a folder that is a link is not opened", "cachedb/disk/folders.py", "_OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=folder", "_OPEN_FOLDER, dir_fd=folder", "tests/disk/test_folders.py tests/disk/test_full_disks.py"),
    Mutation("a folder on another file system is refused", "cachedb/disk/folders.py", "if found.st_dev != self.status.st_dev:", "if False:", "tests/disk/test_folders.py"),
    Mutation("a folder of another user is refused", "cachedb/disk/folders.py", "if found.st_uid not in (self.status.st_uid, os.geteuid()) and not is_shared(self.status):", "if False:", "tests/disk/test_folders.py"),
    Mutation("a directory of another user is refused", "cachedb/disk/folders.py", "if owner != os.geteuid() and not trust and not is_shared(self.status):", "if False:", "tests/disk/test_folders.py"),
    Mutation("files that root makes get the directory's owner", "cachedb/disk/folders.py", "        os.fchown(file, folder.st_uid, folder.st_gid)\n", "        pass\n", "tests/disk/test_folders.py"),
    Mutation("a directory without a marker is not taken for a cache", "cachedb/index/sqlite/prepare.py", "        if strange and marker.read(database.folders.root) is None:", "        if False:", "tests/disk/test_folders.py"),
    Mutation("the marker is synced before it gets its name", "cachedb/disk/marker.py", "            os.fsync(file)\n", "", "tests/disk/test_folders.py"),
    Mutation("the marker's name is synced before anything else is made", "cachedb/disk/marker.py", "    os.fsync(folder)\n", "", "tests/disk/test_folders.py"),
    Mutation("a second marker does not replace the first", "cachedb/disk/marker.py", "        os.link(part, MARKER, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)", "        os.replace(part, MARKER, src_dir_fd=folder, dst_dir_fd=folder)", "tests/disk/test_folders.py"),
    Mutation("a newer format of the directory is refused", "cachedb/disk/marker.py", "    if marker.format > _FORMAT:", "    if False:", "tests/disk/test_folders.py"),
    Mutation("foreign files in trash/ stay", "cachedb/content/collect.py", "[name for name in os.listdir(trash) if trash_digest(name)]", "os.listdir(trash)", "tests/disk/test_folders.py"),
    Mutation("foreign files in a session's folder stay", "cachedb/content/session.py", "filter(is_received, os.listdir(folder))", "os.listdir(folder)", "tests/disk/test_folders.py tests/content/test_session.py"),
    Mutation("a folder in ingest/ that is no session's stays", "cachedb/content/session.py", 'set(filter(is_session, os.listdir(directory / "ingest")))', 'set(os.listdir(directory / "ingest"))', "tests/disk/test_folders.py"),
    Mutation("a lock file that is no session's stays", "cachedb/content/session.py", 'if lock_kind(name) == "session"', "if name.endswith(_LOCK_SUFFIX)", "tests/disk/test_folders.py"),
    Mutation("a file in partial/ that is no download stays", "cachedb/disk/downloads.py", "        if digest is None:\n            continue  # not a download of ours\n", "", "tests/disk/test_folders.py"),
    Mutation("a link is not taken for a download", "cachedb/disk/downloads.py", "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK", "os.O_RDONLY | os.O_NONBLOCK", "tests/operations/test_pull.py -k put_in_the_place_of_a_download"),
    Mutation("a pipe is not taken for a download", "cachedb/disk/downloads.py", "stat.S_ISREG(found.st_mode) and ", "", "tests/operations/test_pull.py -k put_in_the_place_of_a_download"),
    Mutation("a blob is not written through a link", "cachedb/disk/writer.py", "os.O_CREAT | os.O_NOFOLLOW", "os.O_CREAT", "tests/operations/test_pull.py -k at_the_last_moment"),
    Mutation("a blob is not written to a file with a second name", "cachedb/disk/writer.py", "            _check_partial(target)\n", "", "tests/operations/test_pull.py -k at_the_last_moment"),
    Mutation("a download is written to the folder that was opened", "cachedb/transports/registry/source.py", "            folder=folder,\n", "", "tests/operations/test_pull.py -k folder_that_was_opened"),
    Mutation("a spool is a new file", "cachedb/content/session.py", "os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW", "os.O_RDWR | os.O_CREAT", "tests/transports/archive/test_read.py -k place_of_the_spool"),
    Mutation("a spool has no name", "cachedb/content/session.py", "        discard(name, folder.descriptor)\n", "", "tests/transports/archive/test_read.py -k spool_has_no_name"),
    Mutation("a session writes to its opened folder", "cachedb/content/publish.py", "            path.name if path else None,\n            folder=folder,\n", "            path,\n", "tests/content/test_session.py -k folder_that_it_has_opened"),
    Mutation("a session deletes in its opened folder", "cachedb/content/session.py", "discard(path.name, opened.descriptor)", "discard(path)", "tests/content/test_session.py -k folder_that_it_has_opened"),
    Mutation("the reserve is not written to a file with a second name", "cachedb/disk/reserve.py", "                if os.fstat(descriptor).st_nlink > 1:\n                    return  # somebody", "                if False:\n                    return  # somebody", "tests/disk/test_full_disks.py -k second_name"),
    Mutation("the mode of a file with a second name stays", "cachedb/disk/folders.py", "    if found.st_nlink > 1 and not is_folder:", "    if False:", "tests/disk/test_full_disks.py -k second_name"),
    Mutation("a copy is a new file", "cachedb/disk/durable.py", "os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC\n    with", "os.O_RDWR | os.O_CREAT | os.O_CLOEXEC\n    with", "tests/disk/test_durable.py -k copy_of_a_file"),
    Mutation("a backup makes no lock file through a link", "cachedb/index/sqlite/backups.py", "            with folders.open(\"backups\"):\n                pass  # before", "            if True:\n                pass  # before", "tests/disk/test_folders.py -k no_backup_is_made"),
    Mutation("a new index is made in the session's own folder", "cachedb/content/session.py", "if not os.path.samestat(os.fstat(found), created):", "if False:", "tests/content/test_session.py -k new_index"),
    Mutation("a new index is taken from the session's own folder", "cachedb/index/sqlite/backups.py", "database.folders.open(str(source_folder)) as source", "Folders(new.parent.resolve().parent).open(new.parent.resolve().name) as source", "tests/operations/test_rebuild.py -k behind_a_link"),
    Mutation("a shared cache links only files of mode 0444", "cachedb/content/publish.py", "if session.is_shared and not read_only and stat.S_IMODE(before.st_mode) != 0o444:", "if False:", "tests/operations/test_share.py -k in_a_shared_cache_only"),
    Mutation("a resumed copy keeps only its own user's files", "cachedb/operations/copy.py", "        return _is_ours(path.lstat())\n", "        return path.is_file()\n", "tests/operations/test_copy.py -k of_another_user_with_the_name"),
    Mutation("a copy truncates only its own user's files", "cachedb/operations/copy.py", "        if not _is_ours(os.fstat(file)):\n", "        if False:\n", "tests/operations/test_copy.py -k of_another_user_with_the_name"),
    Mutation("a verification without its folder raises a StorageError", "cachedb/operations/verify.py", 'with os_errors("verify the cache"):', "if True:", "tests/operations/test_verify.py -k without_its_ingest"),
    Mutation("a folder in ingest/ that is no new index stays", "cachedb/content/session.py", "                    return  # not a file of ours\n", "                    pass\n", "tests/disk/test_folders.py -k no_new_index"),
    Mutation("a link with the name of an index stays", "cachedb/content/session.py", " and entry.is_file(follow_symlinks=False)", "", "tests/disk/test_folders.py -k folder_of_a_new_index"),
    Mutation("a lock file that is no claim stays", "cachedb/disk/single_flight.py", 'if lock_kind(name) != "producing":', 'if not name.endswith(_CLAIM_SUFFIX):', "tests/disk/test_folders.py"),
    Mutation("a user's own backup stays", "cachedb/index/sqlite/backups.py", "if _BEFORE_CHANGE.fullmatch(path.name)", "if _BEFORE in path.name", "tests/index/sqlite/test_backups.py -k only_backups"),
    Mutation("a file that is no unfinished backup stays", "cachedb/index/sqlite/backups.py", "filter(_UNFINISHED.fullmatch, os.listdir(opened))", "(name for name in os.listdir(opened) if name.startswith(_PART_PREFIX))", "tests/disk/test_folders.py"),
    Mutation("a move from a directory that may be another program's is refused", "cachedb/transports/json_cache.py", "if self.paths and not self.manifests and not self.entries:", "if False:", "tests/disk/test_folders.py"),
    Mutation("no file is moved out through a link", "cachedb/transports/json_cache.py", "                with suppress(FileNotFoundError), self._folders.open(name):\n                    pass\n", "                pass\n", "tests/disk/test_folders.py"),
    Mutation("a failed clean-up does not stop other work", "cachedb/content/collect.py", "                except (OSError, CacheError) as error:\n                    left.append", "                except ValueError as error:\n                    left.append", "tests/disk/test_folders.py"),
    Mutation("a cache that was renamed is not written to", "cachedb/disk/folders.py", "if status is None or not os.path.samestat(status, self.status):", "if False:", "tests/disk/test_folders.py"),
    Mutation("a cache that replaced the opened one is not written to", "cachedb/disk/folders.py", "        if found is None or found.id != self._marker[1]:", "        if False:", "tests/disk/test_folders.py"),
    Mutation("a session whose lock file is gone raises an error", "cachedb/content/session.py", "if not locks.leads_to(lock_path(self._database.directory, self._id), self._lock.fileno()):", "if False:", "tests/disk/test_identity.py"),
    Mutation("a hold whose leases are gone raises an error", "cachedb/content/session.py", "            if deleted < len(hold.digests):\n", "            if False:\n", "tests/disk/test_identity.py -k leases_were_removed"),
    Mutation("a session whose lock file is gone saves no image", "cachedb/content/session.py", "        if numbers:\n            self._check_lock()\n", "        if numbers:\n", "tests/disk/test_identity.py -k lost_session"),
    Mutation("a commit without the lock file is rolled back", "cachedb/index/sqlite/transaction.py", '        turn.check("nothing was written: try again")\n', "        pass\n", "tests/disk/test_identity.py -k rolled_back"),
    Mutation("a renamed lock file counts as lost", "cachedb/disk/locks.py", "        return os.path.samestat(os.stat(path), os.fstat(file))\n", "        return os.fstat(file).st_nlink > 0\n", "tests/disk/test_identity.py"),
    Mutation("a block that lost the write lock raises an error", "cachedb/index/sqlite/database.py", '            turn.check("another process may have written meanwhile: run `cachedb verify`")\n', "", "tests/disk/test_identity.py -k block"),
    Mutation("a connection whose files are gone is not reused", "cachedb/index/sqlite/database.py", "        if not connection.is_outdated():\n            return True\n", "        return True\n", "tests/disk/test_identity.py -k beside"),
    Mutation("a commit without the shared -wal and -shm is rolled back", "cachedb/index/sqlite/transaction.py", "        check_files()\n", "", "tests/disk/test_identity.py -k shared_memory"),
    Mutation("a removed WAL is written back", "cachedb/index/sqlite/file.py", "            connection.save_commits()\n", "            pass\n", "tests/disk/test_identity.py -k saved_while"),
    Mutation("a removed WAL is not written over a new one", "cachedb/index/sqlite/connection.py", "            _pin_if_lost(self)\n", "", "tests/disk/test_identity.py -k beside"),
    Mutation("a new connection does not share removed files in its process", "cachedb/index/sqlite/connection.py", "        if any(_is_lost(other.beside, found) for other in others):", "        if False:", "tests/disk/test_identity.py -k second_connection"),
    Mutation("a copy made of hard links is read-only", "cachedb/disk/access.py", " or self._refusal is not None or self._shortage", " or self._shortage", "tests/disk/test_identity.py -k hard_links"),
    Mutation("a copy made of hard links is noticed while the cache is open", "cachedb/disk/folders.py", "        self.check_links()\n        self.mark(new=False)\n", "        self.mark(new=False)\n", "tests/disk/test_identity.py -k open_cache"),
    Mutation("a hard link of only the index is noticed", "cachedb/disk/folders.py", "        for name in (marker.MARKER, \"index.db\"):\n", "        for name in (marker.MARKER,):\n", "tests/disk/test_identity.py -k alone"),
    Mutation("a leftover link of the marker is no copy", "cachedb/disk/marker.py", "            count = status.st_nlink - sum(entry.inode() == status.st_ino for entry in unfinished)\n", "            count = status.st_nlink\n", "tests/disk/test_identity.py -k killed"),
    Mutation("a copy with the marker's inode number is noticed by its directory", "cachedb/disk/marker.py", "        return self.directory == found[\"directory\"] and not", "        return not", "tests/disk/test_identity.py -k number_of"),
    Mutation("a copy with the marker's inode number is noticed by its file system", "cachedb/disk/marker.py", " and not (same_boot and self.file_system != found[\"file_system\"])\n", "\n", "tests/disk/test_identity.py -k number_of"),
    Mutation("a cache is no copy after a restart of the host", "cachedb/disk/marker.py", "same_boot and self.file_system", "self.file_system", "tests/disk/test_identity.py -k restarted"),
    Mutation("a command that reads creates no cache", "cachedb/index/sqlite/prepare.py", "    if not create and not has_cache(database.directory):\n", "    if False:\n", "tests/cli/test_context.py -k creates_nothing"),
    Mutation("a directory with other files is not called empty", "cachedb/index/sqlite/prepare.py", "(found := _find_strange_file(database, database.directory))", "(found := None)", "tests/cli/test_context.py -k other_files"),
    Mutation("a created cache is announced", "cachedb/cli/context.py", "        if is_new and announce:\n", "        if False:\n", "tests/cli/test_context.py -k says_so_once"),
    Mutation("a registry is asked without making a cache", "cachedb/cli/context.py", "    if has_cache(cache_directory()):\n", "    if True:\n", "tests/cli/test_context.py -k registry_is_asked"),
    Mutation("two names of `copy` are not taken for a directory", "cachedb/cli/main.py", "            check_arguments(command, args)\n", "            pass\n", "tests/cli/test_familiar.py -k leads_to_ours"),
    Mutation("a second name of `save` is not overwritten as a file", "cachedb/cli/aliases.py", "        options[\"output\"] = \"-\"  # so that the last name is no file\n", "        pass\n", "tests/cli/test_familiar.py -k save_without"),
    Mutation("a forced `rmi` ignores a missing image", "cachedb/cli/aliases.py", "    options[\"ignore_missing\"] |= force\n", "", "tests/cli/test_familiar.py -k forced"),
    Mutation("an unrelated command is not suggested", "cachedb/cli/groups.py", "        if least > _EDITS_BY_LENGTH.get(len(word), _EDITS_OF_LONG_WORDS):\n", "        if False:\n", "tests/cli/test_familiar.py -k close_spelling"),
    Mutation("the value of an option is no argument", "cachedb/cli/familiar.py", " and before not in with_value]", "]", "tests/cli/test_familiar.py -k our_own"),
    Mutation("zsh completes without compinit", "cachedb/cli/shell_completion.py", "    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }\n", "", "tests/cli/test_shell_completion.py -k zsh"),
    Mutation("zsh completes if compinit is called later", "cachedb/cli/shell_completion.py", "    precmd_functions+=(%(complete_func)s_register)\n", "    %(complete_func)s_register\n", "tests/cli/test_shell_completion.py -k zsh"),
    Mutation("a downgrade to base is refused", "cachedb/index/schema.py", "    if revision == \"base\":\n", "    if False:\n", "tests/operations/test_preview.py -k base"),
    Mutation("a dry run changes nothing", "cachedb/index/schema.py", "        if not database.reserve.run(database.revision):\n", "        if not database.reserve.run(lambda: prepare(database)):\n", "tests/operations/test_preview.py -k then_does"),
    Mutation("a pending backfill needs an upgrade", "cachedb/cli/db.py", "    return _UPGRADE_NEEDED if found.pending or not found.usable else 0", "    return 0 if found.usable else _UPGRADE_NEEDED", "tests/operations/test_preview.py -k pending_backfill"),
    Mutation("a dry run says that the disk is too full", "cachedb/cli/db.py", "    if plan.free_size < plan.needed_size:\n", "    if False:\n", "tests/operations/test_preview.py -k too_little"),
    Mutation("an outdated marker is refreshed", "cachedb/index/sqlite/prepare.py", "                database.folders.refresh_marker()\n", "                pass\n", "tests/disk/test_identity.py -k older_release"),
    Mutation("a value that format() makes has a size limit", "cachedb/index/sqlite/query.py", "            connection.create_function(name, -1, _Format(), deterministic=True)\n", "            pass\n", "tests/index/sqlite/test_query.py -k value_has_a_size"),
    Mutation("a blob that a copy links or clones is verified", "cachedb/operations/copy.py", "                _receive(file, None, digest, size, advance)\n", "                advance(size)\n", "tests/operations/test_copy.py -k corrupt_blob"),
    Mutation("the kernel names the holder of a lock that names none", "cachedb/disk/locks.py", "    return read_holder(file) or processes.find_flock_holder(file)\n", "    return read_holder(file)\n", "tests/disk/test_identity.py -k named_by"),
    Mutation("the process that locks the whole index is named", "cachedb/disk/processes.py", ", (str(index), *_INDEX_LOCKS)):", ",):", "tests/disk/test_identity.py -k index_exclusively"),
    Mutation("ps works without the index", "cachedb/cli/maintenance.py", "    if is_ours(directory) and (directory / \"locks\").is_dir():\n", "    if False:\n", "tests/disk/test_identity.py -k index_exclusively"),
    Mutation("an index that is no regular file is an error", "cachedb/index/sqlite/file.py", "        if not stat.S_ISREG(status.st_mode):\n", "        if False:\n", "tests/index/sqlite/test_database.py -k regular"),
    Mutation("an index is not replaced after the write lock is lost", "cachedb/index/sqlite/replace.py", '        turn.check("the index was not replaced: try again")\n', "", "tests/disk/test_identity.py -k lost_the_lock"),
    Mutation("a lock is taken on the folder that has the name now", "cachedb/disk/locks.py", "            if leads_to(path, folder):\n                yield\n                return\n", "            yield\n            return\n", "tests/disk/test_identity.py -k folder_that_is_renamed"),
    Mutation("a file that its group can write to is not linked", "cachedb/content/publish.py", "before.st_mode & (stat.S_IWGRP | stat.S_IWOTH):", "before.st_mode & stat.S_IWOTH:", "tests/operations/test_share.py"),
    Mutation("another user's download is not resumed", "cachedb/disk/downloads.py", " and found.st_uid == os.geteuid()", "", "tests/operations/test_share.py"),
    Mutation("a new file follows the mode of its folder", "cachedb/disk/folders.py", "        os.fchmod(file, mode)\n", "        pass\n", "tests/operations/test_share.py"),
    Mutation("a new index gets the directory's group", "cachedb/disk/folders.py", "        os.fchown(file, -1, folder.st_gid)  # it was made in another folder\n", "        pass\n", "tests/disk/test_folders.py -k gets_the_group"),
    Mutation("a new file of the cache follows the mode of the directory", "cachedb/disk/folders.py", "            apply_folder_mode(file, self.status)\n        except", "            pass\n        except", "tests/operations/test_share.py"),
    Mutation("a new index follows the mode of the directory", "cachedb/index/sqlite/backups.py", "            apply_folder_mode(file, database.folders.status)\n", "            pass\n", "tests/operations/test_share.py"),
    Mutation("sharing changes the files of a cache too", "cachedb/operations/share.py", "                _set_group_and_mode(file, gid, _FILE_MODE)\n", "                pass\n", "tests/operations/test_share.py"),
    Mutation("a new directory has mode 0700 whatever the umask", "cachedb/index/sqlite/prepare.py", "            database.directory.chmod(0o700)  # whatever the umask\n", "", "tests/operations/test_share.py"),
    # Exit, signals, re-entry, unfinished files, closing, standard streams
    Mutation("work is done in the caller if no thread can be started", "cachedb/threads.py", "        if not threads_begun:\n            run()\n", "", "tests/test_exit.py"),
    Mutation("a thread that cannot be started is no error", "cachedb/threads.py", "    except RuntimeError:\n        return False\n", "    except ZeroDivisionError:\n        return False\n", "tests/test_exit.py"),
    Mutation("files are unlinked if no thread can be started", "cachedb/content/collect.py", "                started.pop()\n                unlink(share)\n", "                started.pop()\n", "tests/test_exit.py"),
    Mutation("a write inside a write is refused", "cachedb/reentry.py", "    if is_held(lock):\n", "    if False:\n", "tests/test_reentry.py -k same_thread"),
    Mutation("a write without waiting counts as a write for re-entry", "cachedb/index/sqlite/database.py", "with holding(self.file.reentry_key), os_errors", "with os_errors", "tests/test_reentry.py -k does_not_wait"),
    Mutation("an index is not replaced while the same thread opens it", "cachedb/index/sqlite/file.py", '            refuse_reentry(opened, f"opening', '            str(f"opening', "tests/test_reentry.py -k open_and_replace"),
    Mutation("a signal handler may use the session", "cachedb/content/session.py", "threading.RLock()", "threading.Lock()", "tests/test_reentry.py -k for_a_moment"),
    Mutation("a signal handler may note a use", "cachedb/content/last_used.py", "threading.RLock()", "threading.Lock()", "tests/test_reentry.py -k for_a_moment"),
    Mutation("a signal handler may lock a file", "cachedb/disk/forks.py", "_guard = threading.RLock()", "_guard = threading.Lock()", "tests/test_reentry.py -k for_a_moment"),
    Mutation("a worker thread counts as its caller for re-entry", "cachedb/threads.py", "            with on_behalf_of(caller):\n                run()\n", "            run()\n", "tests/test_reentry.py -k layout"),
    Mutation("a session is not begun inside its own beginning", "cachedb/content/session.py", "                with not_reentered(f\"session {id(self)}\", \"beginning to write to the cache\"):\n", "                if True:\n", "tests/test_reentry.py -k beginning"),
    Mutation("a claim is noted before its lock is taken", "cachedb/disk/single_flight.py", "        own_paths.add(path)  # before", "        pass  # before", "tests/test_reentry.py -k has_claimed"),
    Mutation("a backup inside a backup is refused", "cachedb/index/sqlite/backups.py", '            stack.enter_context(not_reentered(os.path.realpath(lock), "making a backup of the index"))\n', "", "tests/test_reentry.py -k backup_inside"),
    Mutation("an error of a signal handler is not translated", "cachedb/errors.py", "        if is_callers(error):\n            raise\n        raise StorageError", "        raise StorageError", "tests/test_reentry.py -k unchanged"),
    Mutation("an error of a signal handler is not ignored", "cachedb/errors.py", "return isinstance(error, OSError) and not is_callers(error)", "return isinstance(error, OSError)", "tests/test_reentry.py -k unchanged"),
    Mutation("an error of a callback is marked", "cachedb/errors.py", "            setattr(error, _CALLER_MARK, True)\n", "", "tests/test_reentry.py -k callback"),
    Mutation("an error of a callback does not count as a damaged blob", "cachedb/operations/verify.py", "        if is_callers(error):\n            raise  # the callback", "        if False:\n            raise  # the callback", "tests/test_reentry.py -k callback"),
    Mutation("an error raised in a callback of SQLite is kept", "cachedb/index/sqlite/query.py", "        callbacks.raise_again()\n", "", "tests/test_reentry.py -k handlers_error"),
    Mutation("a file has no name before it is whole", "cachedb/disk/durable.py", "        unnamed = os.open(part.parent,", "        raise OSError(errno.EOPNOTSUPP, '')\n        unnamed = os.open(part.parent,", "tests/disk/test_durable.py -k need_no_name"),
    Mutation("an unfinished file is locked", "cachedb/disk/durable.py", "        lock_part(file.fileno())\n", "", "tests/disk/test_durable.py -k those_of_live_ones"),
    Mutation("a locked leftover stays", "cachedb/disk/durable.py", "        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "", "tests/disk/test_durable.py -k provably"),
    Mutation("a leftover of another user stays", "cachedb/disk/durable.py", " or status.st_uid != os.geteuid():", ":", "tests/disk/test_durable.py -k other_users"),
    Mutation("a file removed before it was locked is made again", "cachedb/disk/durable.py", "        if os.fstat(file.fileno()).st_nlink:\n", "        if True:\n", "tests/disk/test_durable.py -k made_again"),
    Mutation("an export removes leftovers of killed exports", "cachedb/transports/archive/write_tar.py", "            remove_leftovers(path.parent)\n", "", "tests/disk/test_durable.py -k those_of_live_ones"),
    Mutation("a backup removes leftovers of killed backups", "cachedb/index/sqlite/backups.py", "            remove_leftovers(path.parent, _PART, beside=_JOURNAL)\n", "            pass\n", "tests/disk/test_durable.py -k killed_backup"),
    Mutation("an unfinished backup is locked", "cachedb/index/sqlite/backups.py", "        if is_lockable:\n            lock_part(file)\n", "", "tests/disk/test_durable.py -k killed_backup"),
    Mutation("a closed cache is refused", "cachedb/cache.py", "        if self._closed:\n            raise CacheError(CLOSED)\n", "        pass\n", "tests/test_closing.py"),
    Mutation("a closed session does not begin again", "cachedb/content/session.py", "            if self._closed:\n                raise CacheError(CLOSED)\n", "", "tests/test_closing.py -k after_its_end"),
    Mutation("a connection in use is closed once it is idle", "cachedb/index/sqlite/database.py", "        if self.ended and connection is not None:\n", "        if False:\n", "tests/test_closing.py -k connection"),
    Mutation("no file of the cache is stdin, stdout or stderr", "cachedb/cli/streams.py", '    for name in ("stdin", "stdout", "stderr"):', '    for name in ("stdout", "stderr"):', "tests/cli/test_streams.py -k takes_the_place"),
    Mutation("a result that could not be printed is an error", "cachedb/cli/main.py", "        sys.stdout.flush()\n        sys.exit(code)\n", "        sys.exit(code)\n", "tests/cli/test_streams.py -k full_stdout"),
    # Collection
    Mutation("a leased blob is not collected", "cachedb/content/collect.py", "    ~select(LEASES.c.digest).where(LEASES.c.digest == BLOBS.c.digest).exists(),\n", "", "tests/content/test_collect.py"),
    Mutation("a referenced blob is not collected", "cachedb/content/collect.py", "    ~select(IMAGE_BLOBS.c.blob_id).where(IMAGE_BLOBS.c.blob_id == BLOBS.c.id).exists(),\n", "", "tests/content/test_collect.py"),
    Mutation("a blob that was stored again is not moved to the trash", "cachedb/content/collect.py", "            stored_again = read_stored_sizes(connection, digests)\n", "            stored_again = {}\n", "tests/content/test_collect.py tests/attacks/test_interleavings.py"),
    Mutation("a removal from blobs/ is synced before its trash row is deleted", "cachedb/content/collect.py", "                for folder in sources.values():\n                    os.fsync(folder)\n", "", POWER),
    Mutation("the write lock is released between slow renames", "cachedb/content/collect.py", "                if time.monotonic() - start_time > _RENAME_SECONDS:\n", "                if False:\n", "tests/content/test_collect.py"),
    Mutation("an error of unlinking in another thread is reported", "cachedb/content/collect.py", "            yield start_unlinking\n            finish()\n", "            yield start_unlinking\n", "tests/content/test_collect.py -k failure_in_a_thread"),
    Mutation("a large collection frees space before its end", "cachedb/content/collect.py", "            unlink()  # in each round, so that a large collection frees space from the start\n", "", "tests/content/test_collect.py -k before_the_next"),
    Mutation("a leased blob is no candidate for collection", "cachedb/content/collect.py", "except_(select(BLOBS.c.id), used, leased)", "except_(select(BLOBS.c.id), used)", "tests/content/test_collect.py"),
    Mutation("a file is noted in the trash before it is unlinked", "cachedb/content/collect.py", '            connection.execute(_build_trash_insert(), [{"digest": row.digest, "size": row.size} for row in files])\n', "            pass\n", "tests/content/test_collect.py"),
    Mutation("a file is unlinked only after the commit that deletes its row", "cachedb/content/collect.py", "        files = [row for row in rows if row.stored_at is not None and is_digest(row.digest)]\n", "        files = [row for row in rows if row.stored_at is not None and is_digest(row.digest)]\n        from pathlib import Path\n        from cachedb.disk.layout import blob_path\n        for row in files:\n            blob_path(Path(connection.engine.url.database).parent, row.digest).unlink(missing_ok=True)\n", "tests/attacks/test_crashes.py tests/attacks/test_interleavings.py"),
    Mutation("dead sessions' leases are swept", "cachedb/content/collect.py", "            holds.forget(connection, gone)\n", "            pass\n", "tests/content/test_collect.py tests/content/test_session.py"),
    Mutation("dead sessions' publications are retracted", "cachedb/content/collect.py", "                        retract(database, descriptor, os.listdir(descriptor))\n", "                        pass\n", "tests/content/test_collect.py tests/attacks/test_crashes.py"),
    # Sessions
    Mutation("a new session's folder is synced", "cachedb/content/session.py", '                sync_folder(self._database.directory / "ingest")\n', "", POWER),
    Mutation("a live session is not swept", "cachedb/content/session.py", "        if lock is None:\n            continue\n", "        if lock is None:\n            lock = locks.acquire(path.with_suffix('.x'))\n            assert lock\n", "tests/content/test_session.py tests/content/test_collect.py"),
    # The database
    Mutation("writers take one lock", "cachedb/index/sqlite/database.py", "turns.hold_in_turn(self.write_lock, wait)", "turns.hold_in_turn(self.write_lock.with_suffix(f'.{id(self)}'), wait)", "tests/index/sqlite/test_database.py"),
    Mutation("a write transaction locks the index from its beginning", "cachedb/index/sqlite/transaction.py", 'cachedb_begin="BEGIN IMMEDIATE"', 'cachedb_begin="BEGIN"', "tests/index/sqlite/test_database.py tests/disk/test_locks.py"),
    Mutation("commits are synced", "cachedb/index/sqlite/connection.py", '"PRAGMA synchronous = FULL"', '"PRAGMA synchronous = NORMAL"', POWER),
    Mutation("foreign keys are enforced", "cachedb/index/sqlite/connection.py", "        connection.execute(\"PRAGMA foreign_keys = ON\")\n", "", "tests/index/sqlite/test_database.py tests/index/test_schema.py"),
    Mutation("a newer schema is not written to", "cachedb/index/sqlite/database.py", "        if row != (REVISION,) and not is_compatible(connection):\n", "        if False:\n", "tests/index/test_schema.py"),
    Mutation("a new cache's folders are synced", "cachedb/index/sqlite/prepare.py", "            sync_folder(database.directory / \"blobs\")\n            sync_folder(database.directory)\n", "            pass\n", POWER),
    Mutation("an interrupted commit is made durable", "cachedb/index/sqlite/transaction.py", "    if turn.is_marked:\n", "    if False:\n", "tests/index/sqlite/test_database.py tests/disk/test_locks.py"),
    Mutation("a commit is marked before it begins", "cachedb/index/sqlite/transaction.py", "        turn.mark()\n", "", "tests/index/sqlite/test_database.py tests/disk/test_locks.py"),
    Mutation("a replaced index is not written to", "cachedb/index/sqlite/database.py", "        if connection.file != self.identify_file():\n", "        if False:\n", "tests/operations/test_rebuild.py tests/operations/test_verify.py"),
    Mutation("a replaced index answers no look-up", "cachedb/index/sqlite/lookups.py", "                if not self._is_current(connection):\n", "                if False:\n", "tests/index/sqlite/test_database.py"),
    Mutation("a look-up needs the current schema", "cachedb/index/sqlite/lookups.py", "                is_ours = connection.execute(SELECT_REVISION).fetchone() == (REVISION,)\n", "                is_ours = True\n", "tests/index/sqlite/test_database.py"),
    Mutation("a look-up reads the schema in its own transaction", "cachedb/index/sqlite/lookups.py", "                connection.execute(\"BEGIN\")\n                is_ours = connection.execute(SELECT_REVISION).fetchone() == (REVISION,)\n", "                is_ours = connection.execute(SELECT_REVISION).fetchone() == (REVISION,)\n                connection.execute(\"BEGIN\")\n", "tests/index/sqlite/test_database.py"),
    Mutation("a fork waits for look-ups", "cachedb/index/sqlite/lookups.py", "        with forks.no_fork():\n            try:\n                connection = self._idle.pop()\n", "        if True:\n            try:\n                connection = self._idle.pop()\n", "tests/index/sqlite/test_database.py -k look_up"),
    Mutation("connections for look-ups are closed before a fork", "cachedb/index/sqlite/lookups.py", "                self._idle.pop().close()\n", "                break\n", "tests/index/sqlite/test_database.py"),
    # Locks
    Mutation("a lock on an unlinked file does not count", "cachedb/disk/locks.py", "        if leads_to(path, file.fileno()):\n", "        if True:\n", "tests/disk/test_locks.py tests/content/test_session.py"),
    Mutation("connections are closed before a fork", "cachedb/disk/forks.py", "            closable.close()\n", "            pass\n", "tests/index/sqlite/test_database.py tests/disk/test_locks.py tests/disk/test_processes.py"),
    Mutation("a forked child closes its parent's lock files", "cachedb/disk/forks.py", "    for file in list(_open_files):\n        close_own(file)\n", "", "tests/disk/test_locks.py tests/content/test_session.py"),
    Mutation("a fork waits before it takes the lock of logging", "cachedb/disk/forks.py", "import concurrent.futures.thread  # noqa: F401 - it must register its fork hooks before ours, see below\nimport logging  # noqa: F401 - as above\n", "", "tests/disk/test_locks.py -k may_log"),
    Mutation("a fork waits before it takes the lock of thread pools", "cachedb/disk/forks.py", "import concurrent.futures.thread  # noqa", "import concurrent.futures  # noqa", "tests/disk/test_locks.py -k may_log"),
    Mutation("the lowest waiting number is found, whoever locked first", "cachedb/disk/byte_locks.py", "        found, last = start, start - 1  # the kernel does not return the lowest lock first\n", "        return start\n", "tests/disk/test_byte_locks.py"),
    Mutation("writers get the lock in the order in which they asked", "cachedb/disk/turns.py", "            _await_turn(queue[0], path, queue[1], wait)\n", "", "tests/disk/test_locks.py"),
    Mutation("the next waiter keeps its turn until it wakes up", "cachedb/disk/turns.py", "if free and _read_number", "if _read_number", "tests/disk/test_locks.py"),
    Mutation("a stopped waiter is skipped", "cachedb/disk/turns.py", "                    _write_number(queue, _SERVED_OFFSET, served + 1)\n", "                    pass\n", "tests/disk/test_locks.py"),
    Mutation("a waiter that is served late does not lower the number served", "cachedb/disk/turns.py", "max(queue[1], _read_number(queue[0], _SERVED_OFFSET))", "queue[1]", "tests/disk/test_locks.py"),
    Mutation("a shortage of space is found by making a file", "cachedb/index/sqlite/errors.py", "        if shortage := space.find_shortage(directory, RESERVE_BYTES, offset=max(sizes)):\n", "        if shortage := None:\n", "tests/disk/test_full_disks.py -k is_full"),
    Mutation("a limit on file sizes is tested at the end of the index", "cachedb/index/sqlite/errors.py", "RESERVE_BYTES, offset=max(sizes))", "RESERVE_BYTES)", "tests/disk/test_full_disks.py -k outgrows"),
    Mutation("a lack of memory does not count as a full disk", "cachedb/index/sqlite/errors.py", "if getattr(error, \"sqlite_errorcode\", 0) == sqlite3.SQLITE_IOERR_NOMEM:\n", "if False:\n", "tests/disk/test_full_disks.py -k is_full"),
    Mutation("only ENOSPC and EDQUOT count as a full disk", "cachedb/disk/reserve.py", "    return error.errno in (errno.ENOSPC, errno.EDQUOT)\n", "    return error.errno is not None\n", "tests/disk/test_full_disks.py -k is_full"),
    Mutation("an exceeded quota counts as a full disk", "cachedb/disk/reserve.py", "    return error.errno in (errno.ENOSPC, errno.EDQUOT)\n", "    return error.errno == errno.ENOSPC\n", "tests/disk/test_full_disks.py -k is_full"),
    Mutation("a storage error has the errno of its cause", "cachedb/errors.py", "explain(error)}\", errno=error.errno) from error", "explain(error)}\") from error", "tests/attacks/test_limits.py -k fills"),
    Mutation("the reserve includes inodes", "cachedb/disk/reserve.py", "            self._keep_inodes()\n", "            pass\n", "tests/disk/test_full_disks.py -k our_own_names"),
    Mutation("the reserved inodes are used when there are no others", "cachedb/disk/reserve.py", "            if self.give_up_inodes():\n", "            if False:\n", "tests/disk/test_full_disks.py -k downloads"),
    Mutation("a session on a full disk begins with the reserve", "cachedb/content/session.py", "                        lock, opened = self._begin(name)\n                self._id", "                        raise\n                self._id", "tests/disk/test_full_disks.py -k a_session"),
    Mutation("a session that cannot begin leaves no lock file", "cachedb/content/session.py", "            with suppress(OSError):\n                path.unlink()\n            locks", "            locks", "tests/disk/test_full_disks.py -k a_session"),
    Mutation("inodes that the reserve gave up are set aside again", "cachedb/disk/reserve.py", "        if self._gave_up:", "        if False:", "tests/disk/test_full_disks.py -k sets_it_aside_again"),
    Mutation("a cache is read-only if there is no space for a new file", "cachedb/index/sqlite/database.py", "        if error.errno not in NO_ROOM_ERRNOS or self.file.is_new:\n", "        if True:\n", "tests/disk/test_full_disks.py -k without_a_reserve"),
    Mutation("a new cache that cannot be made is an error", "cachedb/index/sqlite/database.py", "        if error.errno not in NO_ROOM_ERRNOS or self.file.is_new:\n", "        if error.errno not in NO_ROOM_ERRNOS:\n", "tests/disk/test_full_disks.py -k as_an_inability"),
    Mutation("a write without space is refused", "cachedb/index/sqlite/database.py", "        if self.access.end_shortage():\n", "        if False:\n", "tests/disk/test_full_disks.py -k without_a_reserve"),
    # The same line as in "a copy made of hard links is read-only", other tests.
    Mutation("a shortage that ends leaves a copy of hard links read-only", "cachedb/disk/access.py", " or self._refusal is not None or self._shortage", " or self._shortage", "tests/disk/test_access.py"),
    Mutation("a cache with space again is no longer read-only", "cachedb/disk/access.py", "        self._shortage = None\n        return True\n", "        return True\n", "tests/disk/test_full_disks.py -k shortage"),
    Mutation("a limit on file sizes does not empty the reserve", "cachedb/disk/reserve.py", "                if error.errno != errno.EFBIG or not os.fstat(descriptor).st_size:\n", "                if True:\n", "tests/disk/test_full_disks.py -k leaves_the_reserve"),
    Mutation("an error names a lack of inodes", "cachedb/errors.py", "    if error.errno == errno.ENOSPC and isinstance", "    if False and isinstance", "tests/disk/test_full_disks.py -k named"),
    Mutation("an error names a limit on file sizes", "cachedb/errors.py", "    if error.errno == errno.EFBIG and (limit", "    if False and (limit", "tests/disk/test_full_disks.py -k limit"),
    Mutation("a file system without space or inodes lacks space", "cachedb/space.py", " and found.f_favail == 0 and found.f_bavail > 0", " and found.f_favail == 0", "tests/disk/test_full_disks.py -k numbers"),
    Mutation("a file system without an inode table does not lack inodes", "cachedb/space.py", "or (found.f_files > 0 and found.f_favail == 0)", "or found.f_favail == 0", "tests/disk/test_full_disks.py -k numbers"),
    Mutation("without unnamed files, statvfs tells the shortage", "cachedb/space.py", "            _check_statistics(directory, size, offset)\n            return None\n", "            return None\n", "tests/disk/test_full_disks.py -k numbers"),
    Mutation("a new cache's file system is tested", "cachedb/index/sqlite/prepare.py", "        check_features(database.directory)\n", "        pass\n", "tests/disk/test_full_disks.py -k refused"),
    Mutation("a file system without flock is refused", "cachedb/disk/file_system.py", "            _find_flock_fault(ours, other)\n            or", "            None or", "tests/disk/test_full_disks.py -k refused"),
    Mutation("a file system without POSIX locks is refused", "cachedb/disk/file_system.py", "            or _find_posix_lock_fault(ours, other)\n", "", "tests/disk/test_full_disks.py -k refused"),
    Mutation("a file system without shared mmap is refused", "cachedb/disk/file_system.py", "            or _find_mmap_fault(ours, other)\n", "", "tests/disk/test_full_disks.py -k refused"),
    Mutation("a file system without hard links is refused", "cachedb/disk/file_system.py", "            or _find_name_fault(path, second)\n", "", "tests/disk/test_full_disks.py -k refused"),
    Mutation("the test of a file system leaves no file", "cachedb/disk/file_system.py", "            stack.callback(_remove, name)\n", "            pass\n", "tests/disk/test_full_disks.py -k refused"),
    Mutation("a FUSE file system is recognized by its source", "cachedb/disk/file_system.py", "            named = kind == \"fuse\" and", "            named = False and", "tests/attacks/test_limits.py -k fuse"),
    Mutation("a file system shared with the VM's host is refused", "cachedb/disk/file_system.py", "    r\"|virtiofs|fakeowner|drvfs|fuse", "    r\"|fuse", "tests/attacks/test_limits.py -k before_anything"),
    Mutation("work is tried again with the reserve on a full disk", "cachedb/disk/reserve.py", "                return (again or work)()\n", "                pass\n", "tests/attacks/test_limits.py"),
    # Forks
    Mutation("a fork does not wait for the reader of an answer", "cachedb/index/sqlite/query.py", "            columns = _read_rows(database, query, parameters or {}, end, timeout, rows, fork_wait)\n            if columns is not None:\n                yield Answer(columns, iter(rows))\n                return\n", "            with database.raw(read_only=True):\n                columns = _read_rows(database, query, parameters or {}, end, timeout, rows, fork_wait)\n                if columns is not None:\n                    yield Answer(columns, iter(rows))\n                    return\n", "tests/disk/test_forks.py -k answer"),
    Mutation("a fork stops a long query", "cachedb/index/sqlite/query.py", "            stopped = time.monotonic() - fork_began > fork_wait\n", "            pass\n", "tests/disk/test_forks.py -k long_query"),
    Mutation("a fork ends a streamed answer", "cachedb/index/sqlite/query.py", "            forks.close_before_fork(self)\n", "", "tests/disk/test_forks.py -k streamed"),
    Mutation("a large answer is spooled to a file", "cachedb/index/sqlite/query.py", "SpooledTemporaryFile(_IN_MEMORY_BYTES)", "SpooledTemporaryFile()", "tests/disk/test_forks.py -k large"),
    Mutation("a fork does not wait for a wait at the write lock", "cachedb/index/sqlite/database.py", "            turn = stack.enter_context(turns.hold_in_turn(self.write_lock, wait))\n", "            stack.enter_context(forks.no_fork())\n            turn = stack.enter_context(turns.hold_in_turn(self.write_lock, wait))\n", "tests/disk/test_forks.py -k other_process"),
    Mutation("a fork does not wait for another program's transaction", "cachedb/index/sqlite/connection.py", "        timeout=0,  # we wait", "        timeout=60,  # we wait", "tests/disk/test_forks.py -k other_process"),
    Mutation("a fork does not wait for a replacement of the index", "cachedb/index/sqlite/file.py", 'Wait("the index", 0) as wait', 'Wait("the index", 60) as wait', "tests/disk/test_forks.py -k other_process"),
    Mutation("a write is retried while another program locks the index", "cachedb/index/sqlite/database.py", "                    except (Busy, IndexChanged) as error:\n                        busy = error\n                    else:\n", "                    except (Busy, IndexChanged) as error:\n                        busy = error\n                        raise\n                    else:\n", "tests/disk/test_forks.py -k other_process"),
    Mutation("a read is retried while another program locks the index", "cachedb/index/sqlite/database.py", "if not isinstance(error, (Busy, IndexChanged)):", "if error:", "tests/disk/test_forks.py -k other_process"),
    Mutation("a look-up is retried while another program locks the index", "cachedb/index/sqlite/database.py", "            found = self._look_up_after(error, statement, values)\n", "            raise\n", "tests/disk/test_forks.py -k other_process"),
    Mutation("progress of a migration is reported in another thread", "cachedb/index/schema.py", "run_migrations(change, connection, target, report_beside)", "run_migrations(change, connection, target, progress)", "tests/disk/test_forks.py -k callers_code"),
    Mutation("progress of a backup is reported in another thread", "cachedb/index/sqlite/backups.py", "                _copy_index(connection, part, report)\n", "                _copy_index(connection, part, progress)\n", "tests/disk/test_forks.py -k callers_code"),
    Mutation("progress of an adoption is reported after its transaction", "cachedb/operations/adopt.py", "                with self._guard:\n                    self._unreported += self._old.blobs.get(digest, 0)\n", "                self._advance(self._old.blobs.get(digest, 0))\n", "tests/disk/test_forks.py -k callers_code"),
    Mutation("an interrupt at the end of a block does not block forks", "cachedb/disk/forks.py", "            _unforked[thread] -= 1\n            with _changed:\n", "            with _changed:\n                _unforked[thread] -= 1\n", "tests/disk/test_forks.py -k interrupt"),
    Mutation("an interrupt does not end a fork's wait", "cachedb/disk/forks.py", "            raised = error\n", "            raise\n", "tests/disk/test_forks.py -k interrupt"),
    # The same line as in "a signal handler may lock a file", other tests.
    Mutation("a signal handler may fork while a lock file is opened", "cachedb/disk/forks.py", "_guard = threading.RLock()", "_guard = threading.Lock()", "tests/disk/test_forks.py -k signals"),
    Mutation("a waiter that fails releases the queue", "cachedb/disk/turns.py", "        locks.release(queue)  #", "        queue.close()  #", "tests/disk/test_forks.py -k queue"),
    Mutation("a forking thread does not wait for its own fork", "cachedb/disk/forks.py", "    _unforked[thread] += 1  # `close` may use `no_fork` blocks\n", "    _unforked[thread] += 0\n", "tests/disk/test_forks.py -k no_fork_block"),
    # Reading without locks
    Mutation("an index read without locks is copied to memory first", "cachedb/index/sqlite/database.py", "            if \"changed=\" not in file[2]:\n                return opened\n", "            if True:\n                return opened\n", "tests/index/sqlite/test_reading_at_rest.py"),
    Mutation("an index that changed during the copy is read again", "cachedb/index/sqlite/connection.py", "    if identify() != connection.file or not connection.is_settled:\n", "    if not connection.is_settled:\n", "tests/index/sqlite/test_reading_at_rest.py"),
    Mutation("an index that was just written is read again", "cachedb/index/sqlite/connection.py", " or not connection.is_settled:\n", ":\n", "tests/index/sqlite/test_reading_at_rest.py"),
    Mutation("an index that looks damaged because it changed is read again", "cachedb/index/sqlite/connection.py", "        if isinstance(error, StorageError) and identify() != connection.file:\n", "        if False:\n", "tests/index/sqlite/test_reading_at_rest.py"),
    Mutation("a copy of the index in memory is read-only", "cachedb/index/sqlite/connection.py", "            copy.execute(\"PRAGMA query_only = ON\")\n", "", "tests/index/sqlite/test_reading_at_rest.py -k refuses_changes"),
    # Waiting
    Mutation("a wait has an end", "cachedb/disk/waiting.py", "            raise self._error(holder() or UNKNOWN)\n", "            left = seconds\n", "tests/disk/test_waiting.py -k ends_after"),
    Mutation("a wait names its holder", "cachedb/disk/waiting.py", "        if now - self._began >= self._next_log:\n", "        if self._seconds < 0:\n", "tests/disk/test_waiting.py -k in_one_line"),
    Mutation("a wait logs one warning per holder", "cachedb/disk/waiting.py", "level = logging.DEBUG if self._logged_holder or holder in _logged_holders else logging.WARNING", "level = logging.WARNING", "tests/disk/test_waiting.py -k logged_once"),
    Mutation("a wait goes on while the holder makes progress", "cachedb/disk/waiting.py", "            self.seen, self._last_progress = seen, now\n", "            self.seen = seen\n", "tests/disk/test_waiting.py -k while_it_makes_progress"),
    Mutation("a claim whose holder makes progress is not taken over", "cachedb/disk/single_flight.py", "        if (status.st_ino, status.st_mtime_ns) == stalled and path", "        if path", "tests/disk/test_waiting.py -k is_not_taken_over"),
    Mutation("dead waiters are skipped at once", "cachedb/disk/turns.py", "        if first is None:\n            return  # the processes before us died\n", "        first = first or now_served + 1\n", "tests/disk/test_waiting.py -k skipped"),
    Mutation("a locked queue does not block writers", "cachedb/disk/turns.py", "        LOG.info(\"waiting without a turn: %s has locked the queue of the write lock\", error.holder)\n        return None\n", "        raise\n", "tests/disk/test_waiting.py -k queue_whose"),
    Mutation("a process that has ended is not named as a holder", "cachedb/disk/locks.py", "    return None if record is None or record[0].is_gone else record[0]\n", "    return None if record is None else record[0]\n", "tests/disk/test_waiting.py -k has_ended"),
    Mutation("a writer waits for another program without the write lock", "cachedb/index/sqlite/database.py", "                    except (Busy, IndexChanged):\n                        pass\n", "                    except (Busy, IndexChanged):\n                        wait.nap(_OUTSIDER_NAPS[0], lambda: processes.index_writer(self.path))\n", "tests/disk/test_waiting.py -k without_the_write_lock"),
    Mutation("SQLITE_BUSY is translated", "cachedb/index/sqlite/errors.py", "    if code == sqlite3.SQLITE_BUSY:\n", "    if code == -1:\n", "tests/disk/test_waiting.py -k our_own_error"),
    Mutation("opening a cache waits for no lock", "cachedb/content/collect.py", "        with database.without_waiting():\n", "        with __import__('contextlib').nullcontext():\n", "tests/disk/test_waiting.py -k only_reads"),
    Mutation("another program's lock on the directory does not block", "cachedb/index/sqlite/file.py", "                    if time.monotonic() > end or not (operation == fcntl.LOCK_EX or old):\n", "                    if time.monotonic() > end + 99:\n", "tests/disk/test_waiting.py -k script_that_locks"),
    Mutation("a claim without progress is taken over", "cachedb/disk/single_flight.py", "                _take_over(path, key, wait.seen)\n", "                pass\n", "tests/disk/test_waiting.py -k without_progress"),
    Mutation("a process that lost its claim does not unlink the next one's file", "cachedb/disk/single_flight.py", "    if not locks.leads_to(path, lock.fileno()):\n        return False\n", "", "tests/disk/test_waiting.py -k without_progress"),
    Mutation("a lost claim is an error", "cachedb/disk/single_flight.py", "        if lock is not None and not locks.leads_to(path, lock.fileno()):\n", "        if lock is None:\n", "tests/disk/test_waiting.py -k without_progress"),
    Mutation("progress of a producer is noted", "cachedb/disk/single_flight.py", "        os.utime(lock.fileno())\n", "        pass\n", "tests/disk/test_waiting.py -k progress"),
    Mutation("a stopped command does not count as progress", "cachedb/cli/holds.py", "os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None", "os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not False", "tests/disk/test_waiting.py -k stopped_command"),
    Mutation("a free write lock is not listed as an activity", "cachedb/reports/sessions.py", "        if locks.is_held(lock):\n", "        if True:\n", "tests/disk/test_waiting.py -k session_is_listed"),
    # Changes of the schema
    Mutation("a backup is synced before it gets its name", "cachedb/index/sqlite/backups.py", "    sync_file(part)\n", "", "tests/operations/test_upgrade.py"),
    Mutation("a change of the schema is refused on a disk that is too full", "cachedb/index/sqlite/backups.py", "    if free < needed:\n", "    if False:\n", "tests/operations/test_upgrade.py"),
    Mutation("a change of the schema that breaks foreign keys is rolled back", "cachedb/index/schema.py", "            if new := Counter(find_broken_keys(connection)) - broken:\n", "            if new := Counter[str]():\n", "tests/operations/test_upgrade.py"),
    Mutation("a backfill by another process is not repeated", "cachedb/operations/upgrade.py", "            if descriptions.read_backfill(connection) != begin:\n", "            if False:\n", "tests/operations/test_upgrade.py"),
    Mutation("a config's digest is verified", "cachedb/content/describe.py", "if len(data) <= DOCUMENT_LIMIT and digest_of(data, blob.digest) != blob.digest:", "if False:", "tests/content/test_describe.py tests/operations/test_upgrade.py"),
    Mutation("the platform that an index states wins", "cachedb/content/describe.py", "            stated.update(platforms)\n", "            pass\n", "tests/content/test_describe.py -k wins"),
    Mutation("an attestation is no platform", "cachedb/content/describe.py", '        if os == "unknown" or (os or architecture) is None:\n', "        if (os or architecture) is None:\n", "tests/content/test_describe.py -k attestation"),
    Mutation("an image without a platform has none", "cachedb/content/describe.py", '        if os == "unknown" or (os or architecture) is None:\n', '        if os == "unknown":\n', "tests/content/test_describe.py -k platform_of_its_config"),
    Mutation("attached layers belong to no platform", "cachedb/content/describe.py", "            layers = layers[: len(found.layers)]\n", "            pass\n", "tests/content/test_describe.py -k attached_layers"),
    Mutation("the platforms of a name that moves are replaced", "cachedb/index/descriptions.py", "        connection.execute(_build_platforms_delete(), {\"of\": image_id})\n", "", "tests/content/test_describe.py -k platform_of_its_config"),
    Mutation("`verify` compares platforms", "cachedb/content/describe.py", "        and read_platforms(connection, image_id) == described.platforms\n", "", "tests/content/test_describe.py -k differ_from_the_config"),
    Mutation("the backfill of 0006 is due in a cache with images", "migrations/versions/0006_platforms_ages_and_typed_views.py", "WHERE EXISTS (SELECT 1 FROM images)", "WHERE 0", "tests/operations/test_upgrade.py -k platforms"),
    Mutation("an older damaged index keeps its times", "cachedb/operations/rebuild.py", "for there in names & {known.name, OLD_NAMES.get(known.name)}", "for there in names & {known.name}", "tests/operations/test_upgrade.py -k older_schema_keeps"),
    Mutation("an older damaged index keeps its holds", "cachedb/operations/rebuild.py", "filter(None, (table.name, OLD_NAMES.get(table.name)))", "(table.name,)", "tests/operations/test_upgrade.py -k older_schema_keeps"),
    Mutation("an expired hold is not in the view", "migrations/versions/0006_platforms_ages_and_typed_views.py", "WHERE h.expires_at IS NULL OR julianday(h.expires_at) > julianday('now')", "", "tests/index/test_holds.py -k expired_hold_is_not_in_the_view"),
    # Changes by other programs
    Mutation("a writer puts WAL mode back", "cachedb/index/sqlite/database.py", "                ensure_wal(driver)\n", "", "tests/operations/test_verify.py -k wal"),
    Mutation("a lost WAL mode is reported", "cachedb/operations/verify.py", '    if mode != "wal":\n', "    if False:\n", "tests/operations/test_verify.py -k lost_wal"),
    Mutation("the journal mode of an index at rest is read", "cachedb/index/sqlite/inspect.py", "    if \"changed=\" in database.identify_file()[2]:", "    if False:", "tests/operations/test_verify.py -k lost_wal"),
    Mutation("`db check` reports a lost WAL mode", "cachedb/index/drift.py", '    if journal_mode != "wal":\n', "    if False:\n", "tests/operations/test_upgrade.py -k drift_is_found"),
    Mutation("`verify` reports a trigger", "cachedb/index/drift.py", "WHERE type = 'trigger' ORDER BY name", "WHERE type = 'nothing' ORDER BY name", "tests/operations/test_verify.py -k trigger_is_reported"),
    Mutation("a backup with foreign objects is refused", "cachedb/operations/restore.py", "        _refuse_foreign_objects(new, file)  # before", "        # before", "tests/operations/test_upgrade.py -k refused"),
    Mutation("a backup of a newer schema with a trigger is refused", "cachedb/index/drift.py", 'for kind, name in sorted(there) if kind == "trigger"]', 'for kind, name in sorted(there) if kind == "nothing"]', "tests/operations/test_upgrade.py -k newer_schema_with"),
    Mutation("a foreign object with SQLite's prefix is found", "cachedb/index/sqlite/revision.py", "        AND NOT (type = 'table' AND name IN ('sqlite_sequence', 'sqlite_stat1', 'sqlite_stat3', 'sqlite_stat4'))", "        AND name NOT LIKE 'sqlite_%'", "tests/operations/test_upgrade.py -k forged"),
    # Copies
    Mutation("a copy leases the blobs that were stored last", "cachedb/operations/copy.py", "session.lease(connection, read_all_stored_sizes(connection).keys() - _leased_digests(leased))", "session.lease(connection, [])", "tests/operations/test_copy.py -k removed_during"),
    Mutation("a copy's index is of the same snapshot as its leases", "cachedb/operations/copy.py", "database.raw(read_only=True))  # it begins", "database.raw())  # it begins", "tests/operations/test_copy.py -k removed_during"),
    Mutation("a copy drops the leases of sessions", "cachedb/operations/copy.py", "            connection.execute(delete(LEASES).where(LEASES.c.session.not_in(select(HOLDS.c.id))))\n", "", "tests/operations/test_copy.py -k stay_behind"),
    Mutation("a copy keeps the leases of holds", "cachedb/operations/copy.py", "delete(LEASES).where(LEASES.c.session.not_in(select(HOLDS.c.id)))", "delete(LEASES)", "tests/operations/test_copy.py -k stay_behind"),
    Mutation("a copy has an empty trash table", "cachedb/operations/copy.py", "            connection.execute(delete(TRASH))\n", "", "tests/operations/test_copy.py -k stay_behind"),
    Mutation("a damaged index is not copied", "cachedb/operations/copy.py", "        if faults := find_faults(copied, quick=True):", "        if faults := list[str]():", "tests/operations/test_copy.py -k damaged_index"),
    Mutation("a file of another size is not copied", "cachedb/operations/copy.py", "        if status.st_size != size:\n", "        if False:\n", "tests/operations/test_copy.py -k short_file"),
    Mutation("a copy follows no link in blobs/", "cachedb/operations/copy.py", "os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC", "os.O_RDONLY | os.O_CLOEXEC", "tests/operations/test_copy.py -k short_file"),
    Mutation("a copy does not link a file that others can write to", "cachedb/operations/copy.py", " and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)", "", "tests/operations/test_copy.py -k others_can_write"),
    Mutation("a copied blob's digest is verified", "cachedb/operations/copy.py", "source, target, digest=digest, size=size,", "source, target, size=size,", "tests/operations/test_copy.py -k verified"),
    Mutation("a copy is not made inside the cache", "cachedb/operations/copy.py", "    if directory.resolve().is_relative_to(source.resolve()):\n", "    if False:\n", "tests/operations/test_copy.py -k outside"),
    Mutation("a copy is made into an empty directory", "cachedb/operations/copy.py", "    if unknown:\n", "    if False:\n", "tests/operations/test_copy.py -k outside"),
    Mutation("a copy does not overwrite a cache", "cachedb/operations/copy.py", '    if "index.db" in entries:\n', "    if False:\n", "tests/operations/test_copy.py -k outside"),
    Mutation("only one process copies into a directory", "cachedb/operations/copy.py", "    if lock is None:\n", "    if False:\n", "tests/operations/test_copy.py -k one_process"),
    Mutation("a stray file of an interrupted copy is not taken for a blob", "cachedb/operations/copy.py", "            raise NotACache(f\"{str(strays[0])!r} is not a blob: name a new or empty directory\")\n", "            pass\n", "tests/operations/test_copy.py -k killed"),
    Mutation("a failed copy is removed", "cachedb/operations/copy.py", "                    _delete_leftovers(directory)\n", "                    pass\n", "tests/operations/test_copy.py -k interrupt_leaves"),
    Mutation("a copy releases its leases", "cachedb/operations/copy.py", "                publish.release_after_error(database, session, hold)\n", "                pass\n", "tests/operations/test_copy.py -k stay_behind"),
    # Copies made by other programs
    Mutation("a copy is noticed by its marker", "cachedb/disk/folders.py", "        self.is_copy = found is None or status is None or found.is_of(self.root) is False\n", "", "tests/operations/test_copy.py -k torn_copy"),
    Mutation("a copy without its marker is checked", "cachedb/index/sqlite/prepare.py", "is_sound=database.file.is_new)", "is_sound=True)", "tests/operations/test_copy.py -k torn_copy"),
    Mutation("a copy is checked before it is opened", "cachedb/index/sqlite/prepare.py", "            accept_copy(database, check=True)\n", "            accept_copy(database, check=False)\n", "tests/operations/test_copy.py -k torn_copy"),
    Mutation("a copy with a damaged index is refused", "cachedb/index/sqlite/prepare.py", "        faults = [] if found == \"ok\" else [str(found)]\n", "        faults = list[str]()\n", "tests/operations/test_copy.py -k lacks_entries"),
    Mutation("a copy that lacks a blob is refused", "cachedb/index/sqlite/prepare.py", "                if not is_there:\n", "                if False:\n", "tests/operations/test_copy.py -k lacks_a_blob"),
    Mutation("a copy is checked once", "cachedb/index/sqlite/prepare.py", "                database.folders.accept_copy()\n", "                pass\n", "tests/operations/test_copy.py -k sound_copy"),
    Mutation("only one process accepts a copy", "cachedb/index/sqlite/prepare.py", "        database.folders.mark(new=False)  # another process may have done so meanwhile\n", "", "tests/operations/test_copy.py -k accepted_once"),
    Mutation("a read-only copy is checked", "cachedb/index/sqlite/prepare.py", "            if folders.is_copy and revision is not None:", "            if False:", "tests/operations/test_copy.py -k only_be_read"),
    Mutation("a repaired copy is accepted", "cachedb/operations/verify.py", "        accept_copy(database, check=False)  # the", "        pass  # the", "tests/operations/test_copy.py -k repaired_copy_is_accepted"),
    # Adoption
    Mutation("nothing outside the other cache is read", "cachedb/transports/json_cache.py", "if inside and stat.S_ISREG(path.lstat().st_mode):", "if stat.S_ISREG(path.lstat().st_mode):", "tests/operations/test_adopt.py"),
    Mutation("a move keeps the source of a blob that is damaged in this cache", "cachedb/operations/adopt.py", "if digest in self._new or is_intact(ours, digest):", "if True:", "tests/operations/test_adopt.py"),
    Mutation("a move deletes only files whose blobs are stored", "cachedb/operations/adopt.py", "            stored = publish.find_intact(connection, ours, self._old.paths)\n", "            stored = dict.fromkeys(self._old.paths)\n", "tests/operations/test_adopt.py"),
    Mutation("a name that was taken meanwhile is not adopted", "cachedb/operations/adopt.py", "image.name not in here or not self._is_settled(connection, image)]", "True]", "tests/operations/test_adopt.py"),
    Mutation("a moved file becomes read-only", "cachedb/content/publish.py", "                os.fchmod(file, 0o444)\n", "                pass\n", "tests/operations/test_adopt.py"),
    Mutation("progress counts a shared blob once", "cachedb/operations/adopt.py", "is_first = self._is_first(digest)\n", "is_first = True\n", "tests/operations/test_adopt.py"),
    # Registries
    Mutation("credentials are not sent to another host", "cachedb/transports/registry/client.py", 'if authorization and origin(url) == owner else {}', 'if authorization else {}', "tests/operations/test_pull.py"),
    Mutation("a redirect from HTTPS to HTTP is refused", "cachedb/transports/registry/client.py", "        if origin(following)[0] not in allowed:\n", "        if False:\n", "tests/operations/test_pull.py -k http"),
    Mutation("an HTTPS registry names no token server with HTTP", "cachedb/transports/registry/authorization.py", "        if scheme not in allowed:\n", "        if False:\n", "tests/operations/test_pull.py -k http"),
    Mutation("HTTPS never leads to HTTP", "cachedb/transports/registry/urls.py", '("https",) if origin(url)[0] == "https" else ("http", "https")', '("http", "https")', "tests/operations/test_pull.py -k http"),
    Mutation("loopback has no proxy", "cachedb/transports/registry/proxies.py", '    if host == "localhost" or (address and address.is_loopback):\n', '    if host == "localhost":\n', "tests/transports/registry/test_proxies.py"),
    Mutation("a port in no_proxy is compared", "cachedb/transports/registry/proxies.py", "    if wanted and int(wanted) != port:\n", "    if False:\n", "tests/transports/registry/test_proxies.py"),
    Mutation("no_proxy lists networks", "cachedb/transports/registry/proxies.py", "return address is not None and address in ip_network(entry, strict=False)", "return False", "tests/transports/registry/test_proxies.py"),
    Mutation("the login of a proxy is percent-decoded", "cachedb/transports/registry/proxies.py", 'format_basic(unquote(user), unquote(password))', 'format_basic(user, password)', "tests/transports/registry/test_proxies.py"),
    Mutation("a CGI script ignores HTTP_PROXY", "cachedb/transports/registry/proxies.py", 'names = ["http_proxy"] if scheme == "http" and "REQUEST_METHOD" in os.environ else', 'names =', "tests/transports/registry/test_proxies.py"),
    Mutation("authorities of a registry are trusted for its other hosts", "cachedb/transports/registry/tls.py", "        authorities += more\n", "        authorities = more\n", "tests/transports/registry/test_tls.py"),
    Mutation("a client certificate is shown to its own host only", "cachedb/transports/registry/tls.py", "        more, clients = _list_files(host)\n", "        more, _ = _list_files(host)\n", "tests/transports/registry/test_tls.py"),
    Mutation("a client certificate without a key is an error", "cachedb/transports/registry/tls.py", '        if not path.with_suffix(".key").exists():\n', "        if False:\n", "tests/transports/registry/test_tls.py"),
    Mutation("a file of certs.d without a certificate is named", "cachedb/transports/registry/tls.py", '            LOG.warning("%r is not used: %s", str(path), reason)\n', "            pass\n", "tests/transports/registry/test_tls.py"),
    Mutation("a blocked registry is refused", "cachedb/transports/registry/routes.py", "    if registry and registry.blocked:\n", "    if False:\n", "tests/transports/registry/test_routes.py"),
    Mutation("a mirror has its own rules for certificates", "cachedb/transports/registry/routes.py", "found.append(_secure(where, of_mirrors, ", "found.append(_secure(where, access, ", "tests/transports/registry/test_routes.py"),
    Mutation("--tls keeps HTTPS without verification", "cachedb/transports/registry/routes.py", "    if access.plain_http is not None:\n", "    if access.plain_http:\n", "tests/transports/registry/test_routes.py"),
    Mutation("certificates are verified unless the place is insecure", "cachedb/transports/registry/client.py", "verify=place.is_verified)", "verify=False)", "tests/transports/registry/test_routes.py"),
    Mutation("a prefix of registries.conf ends at a slash", "cachedb/transports/registry/registries_conf.py", ' and name[len(prefix) : len(prefix) + 1] in ends else 0', " else 0", "tests/transports/registry/test_registries_conf.py"),
    Mutation("a port does not end a host in registries.conf", "cachedb/transports/registry/registries_conf.py", 'if "/" in prefix else ("", "/")', "", "tests/transports/registry/test_registries_conf.py -k longest"),
    Mutation("registries.conf does not change a tag silently", "cachedb/transports/registry/routes.py", '        if ":" in repository or "@" in repository:\n', "        if False:\n", "tests/transports/registry/test_routes.py -k tag"),
    Mutation("a list of referrers that fails is reported", "cachedb/transports/registry/repository.py", "        if not found and isinstance(failure, RegistryUnavailable):\n", "        if False:\n", "tests/operations/test_push.py -k silently"),
    Mutation("another host that fails to list referrers is not asked again", "cachedb/transports/registry/repository.py", "in RETRY_STATUSES and is_ours and", "in RETRY_STATUSES and", "tests/operations/test_push.py -k asked_again"),
    Mutation("credentials that were refused are read again", "cachedb/transports/registry/authorization.py", "                self._found.clear()  #", "                pass  #", "tests/transports/registry/test_authorization.py -k read_once"),
    Mutation("a refresh token is not sent to another host", "cachedb/transports/registry/client.py", "            if is_token and body is not None and origin(url) != owner:\n", "            if False:\n", "tests/transports/registry/test_authorization.py"),
    Mutation("a scope is a parameter of its own", "cachedb/transports/registry/authorization.py", '[*service, *(("scope", scope) for scope in scopes)]', '[*service, ("scope", " ".join(scopes))]', "tests/transports/registry/test_authorization.py"),
    Mutation("an open repository is not asked for a challenge", "cachedb/transports/registry/client.py", "        if self._is_open:\n            return []\n", "", "tests/transports/registry/test_authorization.py"),
    Mutation("given credentials are not for mirrors", "cachedb/transports/registry/routes.py", "tls_verify=access.tls_verify or None, credentials=None)", "tls_verify=access.tls_verify or None)", "tests/transports/registry/test_authorization.py"),
    Mutation("interim answers are skipped", "cachedb/transports/registry/heads.py", '            if not status or not status[0].startswith(b"1") or status[0] == _SWITCHING_PROTOCOLS:\n', "            if True:\n", "tests/transports/registry/test_heads.py"),
    Mutation("the head of an answer has a limit", "cachedb/transports/registry/heads.py", "            if size > _MAX_BYTES:\n", "            if False:\n", "tests/transports/registry/test_heads.py"),
    Mutation("a compressed blob that is called encoded is not decoded", "cachedb/transports/registry/download.py", "self._response.status == 200 and is_encoded(self._response) and not has_size", "self._response.status == 200 and is_encoded(self._response)", "tests/transports/registry/test_heads.py"),
    Mutation("a range of an encoded body is not used", "cachedb/transports/registry/repository.py", '(sent[2] == "*" and not is_encoded(response))', 'sent[2] == "*"', "tests/transports/registry/test_heads.py"),
    Mutation("a request without an answer is not sent again", "cachedb/transports/registry/explain.py", "isinstance(error, (NewConnectionError, ReadTimeoutError))", "isinstance(error, NewConnectionError)", "tests/transports/registry/test_time.py"),
    Mutation("a slow head is not requested again", "cachedb/transports/registry/explain.py", "return any(isinstance(cause, SlowHead) for cause in error.args)", "return False", "tests/transports/registry/test_time.py"),
    Mutation("a body that has begun is waited for a shorter time", "cachedb/transports/registry/heads.py", "            self._has_begun = True\n            with ignore_os_errors():  # the socket may be closed by now\n                self._socket.settimeout(_READ_SECONDS)\n", "            self._has_begun = True\n", "tests/transports/registry/test_time.py"),
    Mutation("a body is waited for as long as a head", "cachedb/transports/registry/heads.py", "        if self.status in (200, 206):\n", "        if False:\n", "tests/transports/registry/test_time.py"),
    Mutation("a head has a limit of time", "cachedb/transports/registry/heads.py", "            if time.monotonic() > deadline:\n", "            if False:\n", "tests/transports/registry/test_time.py"),
    Mutation("a document has a limit of time", "cachedb/transports/registry/answers.py", "            if time.monotonic() > deadline:\n", "            if False:\n", "tests/transports/registry/test_time.py"),
    Mutation("a long wait for a first byte is no stall", "cachedb/transports/registry/download.py", "            if waited > _SHORT_WAIT_SECONDS:\n", "            if False:\n", "tests/transports/registry/test_client.py -k first_byte"),
    Mutation("a secret in base64 is hidden", "cachedb/transports/registry/redaction.py", "    return any(secret in data for data in _decode(run) for secret in encoded)\n", "    return False\n", "tests/transports/registry/test_redaction.py"),
    Mutation("a percent-encoded secret is hidden", "cachedb/transports/registry/redaction.py", "    decoded = unquote_plus(text)\n", "    decoded = text\n", "tests/transports/registry/test_redaction.py"),
    Mutation("a password is hidden", "cachedb/transports/registry/authorization.py", "            remember(secret)\n", "            pass\n", "tests/transports/registry/test_redaction.py"),
    Mutation("a token is hidden", "cachedb/transports/registry/authorization.py", "        remember_briefly(token)\n", "", "tests/transports/registry/test_redaction.py"),
    Mutation("a signature of a link is hidden", "cachedb/transports/registry/client.py", "                    remember_briefly(unquote(value))\n", "                    pass\n", "tests/transports/registry/test_redaction.py"),
    Mutation("only the registry itself warns", "cachedb/transports/registry/client.py", "            if is_ours:\n                self._show_warnings(response)\n", "            self._show_warnings(response)\n", "tests/transports/registry/test_explain.py"),
    Mutation("a proxy that is down is named at once", "cachedb/transports/registry/explain.py", "return isinstance(cause, NewConnectionError) or", "return False or", "tests/transports/registry/test_explain.py"),
    Mutation("an answer names the host that sent it", "cachedb/transports/registry/client.py", "            response.url = url\n", "", "tests/transports/registry/test_explain.py"),
    Mutation("two processes do not download the same blob", "cachedb/operations/pull.py", "        key = downloads.claim_key(blob.digest)\n", "        key = str(id(blob))\n", "tests/operations/test_pull.py"),
    Mutation("a download whose earlier part is damaged starts again", "cachedb/transports/registry/source.py", "            if not has_part:\n", "            if True:\n", "tests/operations/test_pull.py"),
    Mutation("a download keeps its name until it is stored", "cachedb/content/publish.py", "    with os_errors(\"write to the cache\"):\n        os.link(path, named.name, dst_dir_fd=folder, follow_symlinks=False)\n", "    with os_errors(\"write to the cache\"):\n        os.rename(path, named.name, dst_dir_fd=folder)\n", "tests/operations/test_pull.py"),
    Mutation("a linked file is synced before it gets its name", "cachedb/content/publish.py", "        os.fsync(file)\n", "", POWER),
    Mutation("a file that others can write to is not linked", "cachedb/content/publish.py", "    if before.st_uid != os.geteuid() or before.st_mode & (stat.S_IWGRP | stat.S_IWOTH):\n", "    if False:\n", "tests/transports/archive/test_read.py"),
    Mutation("a file that grows while it is linked is read to its end", "cachedb/operations/import_archive.py", "files.Section(file, 0, os.fstat(file).st_size)", "files.Section(file, 0, blob.section.size)", "tests/transports/archive/test_read.py -k grows"),
    Mutation("a file that changes while it is linked is refused", "cachedb/content/publish.py", "        if file_identity(found) != file_identity(before):\n", "        if False:\n", "tests/transports/archive/test_read.py tests/operations/test_adopt.py"),
    Mutation("`pull --if-missing` sends no request for a complete image", "cachedb/cli/registries.py", '{"if_missing": if_missing, ', "{", "tests/operations/test_pull.py -k if_missing"),
    Mutation("`pull --all-platforms` pulls all platforms", "cachedb/cli/registries.py", '        "all_platforms": all_platforms,\n', "", "tests/operations/test_pull.py -k command_pulls_all"),
    Mutation("the manifests in memory have a size limit", "cachedb/transports/registry/source.py", "            if sum(map(len, self.documents.values())) + blob.size > _MANIFEST_BYTES:\n", "            if False:\n", "tests/operations/test_pull.py -k memory"),
    Mutation("a mirror with other content is skipped", "cachedb/transports/registry/source.py", "with suppress(RegistryError, DigestMismatch, InvalidManifest):", "with suppress(RegistryError):", "tests/operations/test_pull.py"),
    Mutation("partial downloads are deleted on a full disk", "cachedb/disk/reserve.py", "                freed = downloads.remove_stale_downloads(self._open_folders(), age=0)\n", "                pass\n", "tests/attacks/test_limits.py"),
    Mutation("a pull that fills the disk gives the space back", "cachedb/operations/pull.py", "                downloads.remove_stale_downloads(self._database.folders, age=0)\n", "                pass\n", "tests/attacks/test_limits.py"),
    Mutation("a partial download that is linked to a blob is not resumed", "cachedb/disk/downloads.py", "if found.st_nlink > 1 or found.st_size > size or ", "if found.st_size > size or ", "tests/operations/test_pull.py"),
    Mutation("a downloaded blob is leased until its image is saved", "cachedb/operations/pull.py", "                self._holds.append(self._session.lease(connection, [blob.digest]))\n", "                pass\n", "tests/operations/test_pull.py"),
    Mutation("a partial download becomes writable again", "cachedb/disk/downloads.py", "            os.fchmod(file, 0o600)\n", "", "tests/operations/test_pull.py"),
    Mutation("a manifest from a registry is verified", "cachedb/transports/registry/source.py", "            if digest != expected:", "            if False:", "tests/operations/test_pull.py"),
    Mutation("a pushed blob is leased", "cachedb/content/held.py", "        hold = NO_HOLD if read_only else session.lease(connection, digests)\n", "        hold = NO_HOLD\n", "tests/operations/test_push.py"),
    Mutation("a blob that two tags share is sent once", "cachedb/operations/push.py", "if blob.digest in self._known or ", "if ", "tests/operations/test_push.py -k push_tags"),
    Mutation("a name that no registry can have is no source of a mount", "cachedb/operations/push.py", "            with suppress(InvalidName):  # a name", "            with suppress(KeyError):  # a name", "tests/operations/test_push.py -k mounted"),
    Mutation("an interrupt does not wait for a connection", "cachedb/transports/registry/connections.py", "            self.check_stopped()\n        future.result()\n", "            pass\n        future.result()\n", "tests/operations/test_push.py -k interrupt_does_not_wait"),
    Mutation("a manifest is pushed after the blobs that it names", "cachedb/operations/push.py", "TopologicalSorter(references).static_order()", "reversed(list(TopologicalSorter(references).static_order()))", "tests/operations/test_push.py"),
    Mutation("a pushed manifest is verified", "cachedb/disk/reader.py", "    if digest_of(data, digest) != digest:\n        raise", "    if False:\n        raise", "tests/operations/test_push.py"),
    Mutation("an index is pushed only if the registry has its missing children", "cachedb/operations/push.py", 'and not repository.has("manifests", blob.digest):', "and False:", "tests/operations/test_push.py"),
    Mutation("a listed referrer of another image is not pulled", "cachedb/operations/pull.py", "            refers = oci.subject_of(self._read_child(root)) == subject\n", "            refers = bool(self._read_child(root))\n", "tests/operations/test_push.py"),
    Mutation("an upload without progress ends", "cachedb/transports/registry/repository.py", "                    if sent > furthest:\n", "                    if True:\n", "tests/operations/test_push.py"),
    Mutation("a manifest that the registry stored under another digest is an error", "cachedb/transports/registry/repository.py", "        if stored is not None and stored != digest_of(data, stored):\n", "        if False:\n", "tests/operations/test_push.py"),
    Mutation("the chosen platforms of an index stay chosen", "cachedb/content/save.py", "    choose = platform_choice(connection, image_id)\n", "    choose = None\n", "tests/operations/test_pull.py"),
    # Limits
    Mutation("the bytes of a download are counted per minute", "cachedb/transports/registry/download.py", "        self._received += count\n", "", "tests/transports/registry/test_client.py -k download"),
    Mutation("a try of a slow download ends after one minute", "cachedb/transports/registry/download.py", "elif now - self._since > _MINUTE:", "elif now - self._since > 2 * _MINUTE:", "tests/transports/registry/test_client.py -k download"),
    Mutation("each try of a download begins a new minute", "cachedb/transports/registry/download.py", "            self._since, self._received = now, 0\n            raise", "            raise", "tests/transports/registry/test_client.py -k download"),
    Mutation("skipped bytes are no stall", "cachedb/transports/registry/download.py", "            self._since = time.monotonic()  # skipping is not a stall\n", "", "tests/transports/registry/test_client.py -k stall"),
    Mutation("a name with a tag and a digest pulls the digest", "cachedb/transports/registry/source.py", "return self.expected or self.ask", "return self.ask", "tests/operations/test_pull.py -k tag_and_a_digest"),
    Mutation("an image of another digest does not count as pulled", "cachedb/operations/pull.py", "            if self._source.expected not in (None, info.digest):\n                return None\n", "", "tests/operations/test_pull.py -k tag_and_a_digest"),
    Mutation("an unavailable mirror is skipped by other pulls", "cachedb/transports/registry/source.py", "                failures.note_failure(self._directory, _failure_key(mirror))\n", "", "tests/operations/test_pull.py -k unavailable_mirror"),
    Mutation("a mirror is not waited for as long as a registry", "cachedb/transports/registry/source.py", "timeout=min(how.timeout, _MIRROR_SECONDS)", "timeout=how.timeout", "tests/operations/test_pull.py -k mirror_that_hangs"),
    Mutation("a mirror is tried once", "cachedb/transports/registry/source.py", "_MIRROR_SECONDS)), tries=1)", "_MIRROR_SECONDS)))", "tests/operations/test_pull.py -k unavailable_mirror"),
    Mutation("a skipped mirror is better than no registry", "cachedb/transports/registry/source.py", "            for mirror in list(self._skipped):\n", "            for mirror in ():\n", "tests/operations/test_pull.py -k skipped_mirrors"),
    Mutation("a mirror that answers is asked first again", "cachedb/transports/registry/source.py", "                    failures.forget_failure(self._directory, _failure_key(mirror))\n", "", "tests/operations/test_pull.py -k skipped_mirrors"),
    Mutation("a failure is forgotten after five minutes", "cachedb/disk/failures.py", "0 <= time.time() - found.st_mtime < _SECONDS", "True", "tests/disk/test_failures.py"),
    Mutation("a failure in the future is none", "cachedb/disk/failures.py", "0 <= time.time() - found.st_mtime", "time.time() - found.st_mtime", "tests/disk/test_failures.py"),
    Mutation("a link is no failure", "cachedb/disk/failures.py", "stat.S_ISREG(found.st_mode) and ", "", "tests/disk/test_failures.py"),
    Mutation("old failures are swept", "cachedb/content/collect.py", "        left += sweep_failures(folders)\n", "", "tests/disk/test_failures.py"),
    Mutation("a foreign file beside the failures stays", "cachedb/disk/failures.py", '            if lock_kind(name) != "failure":\n', '            if not name.endswith(_SUFFIX):\n', "tests/disk/test_failures.py"),
    Mutation("indexes in each other end", "cachedb/operations/inspect.py", "        for _ in range(_MAX_DEPTH):\n", "        for _ in range(99):\n", "tests/operations/test_inspect.py -k each_other"),
    Mutation("a digest in a name is verified", "cachedb/operations/inspect.py", "source.root(wanted.digest).digest if wanted.digest else source.digest()", "source.digest()", "tests/operations/test_inspect.py -k one_request"),
    Mutation("a config from a registry is verified", "cachedb/transports/registry/source.py", "            return _verify(blob, bytes(buffer))\n", "            return bytes(buffer)\n", "tests/operations/test_inspect.py -k config_is_verified"),
    Mutation("an invalid tag is not listed", "cachedb/transports/registry/repository.py", "isinstance(tag, str) and is_tag(tag)", "isinstance(tag, str)", "tests/operations/test_inspect.py -k invalid_entries"),
    Mutation("pages of tags have a limit", "cachedb/transports/registry/repository.py", '        raise RegistryError(\n            f"{self.place.registry} lists more than {_MAX_TAG_PAGES} pages', '        return list(found)\n        raise RegistryError(\n            f"{self.place.registry} lists more than {_MAX_TAG_PAGES} pages', "tests/operations/test_inspect.py -k endless_pages"),
    Mutation("a name that fails stops no other", "cachedb/cli/registries.py", "            except CacheError as error:\n                click.echo", "            except KeyError as error:\n                click.echo", "tests/operations/test_inspect.py -k stops_no_other"),
    Mutation("a name that fails makes the exit code 1", "cachedb/cli/registries.py", "    if len(found) < len(wanted):\n", "    if False:\n", "tests/operations/test_inspect.py -k stops_no_other"),
    Mutation("bytes that are sent again do not count as resumed", "cachedb/transports/registry/download.py", "            self.resumed, self._has_begun = begins, True\n", "            pass\n", "tests/operations/test_pull.py -k had_left"),
    Mutation("a foreign layer is left out only if the registry lacks it", "cachedb/transports/registry/source.py", 'for layer in layers if not self.registry.has("blobs", layer.digest)}', "for layer in layers}", "tests/operations/test_pull.py -k foreign"),
    Mutation("an image without its foreign layers is up to date", "cachedb/operations/pull.py", "return self._source.foreign_layers or not blob.is_foreign", "return True", "tests/operations/test_pull.py -k foreign"),
    Mutation("an image is completed with its foreign layers on request", "cachedb/operations/pull.py", "return self._source.foreign_layers or not blob.is_foreign", "return not blob.is_foreign", "tests/operations/test_pull.py -k foreign"),
    Mutation("only foreign layers are downloaded from URLs", "cachedb/transports/registry/source.py", "if not (self.foreign_layers and blob.is_foreign and urls):", "if not (self.foreign_layers and urls):", "tests/operations/test_pull.py -k foreign"),
    Mutation("a foreign layer is not read from a file", "cachedb/transports/registry/source.py", 'if url.startswith(("https://", "http://"))]', "]", "tests/operations/test_pull.py -k foreign"),
    Mutation("a refused range is not requested again", "cachedb/transports/registry/repository.py", "            except RegistryError:\n                pass  # some registries refuse ranges\n", "            except KeyError:\n                pass\n", "tests/operations/test_pull.py -k refuses_ranges"),
    Mutation("an overloaded registry is asked once for the whole blob", "cachedb/transports/registry/repository.py", "                tries = 1  # perhaps it fails only for ranges\n", "                raise\n", "tests/operations/test_pull.py -k refuses_ranges"),
    Mutation("another range than the requested one is dropped", "cachedb/transports/registry/repository.py", "    if sent is None or int(sent[1]) != offset:\n", "    if sent is None:\n", "tests/operations/test_pull.py -k another_range"),
    Mutation("a range of another blob is dropped", "cachedb/transports/registry/repository.py", 'return sent[2] == str(size) or (', 'return True or (', "tests/operations/test_pull.py -k another_range"),
    Mutation("a manifest whose head is refused is requested", "cachedb/transports/registry/repository.py", "self._client.request(\"HEAD\", url, what, _ACCEPTED, good=_ANSWERS)", "self._client.request(\"HEAD\", url, what, _ACCEPTED)", "tests/operations/test_pull.py -k refuses_head"),
    Mutation("a manifest is downloaded once if its head is refused", "cachedb/transports/registry/repository.py", "            self._fetched[digest] = fetched\n", "", "tests/operations/test_pull.py -k refuses_head"),
    Mutation("a page of the network is no manifest", "cachedb/transports/registry/repository.py", "            manifest_media_type(fetched.data, fetched.media_type)  # a page of the network is no manifest\n", "", "tests/operations/test_pull.py -k other_content"),
    Mutation("a blob whose head is refused is requested", "cachedb/transports/registry/repository.py", "            if response.status in (200, 404):\n                return response.status == 200\n", "            return response.status == 200\n", "tests/operations/test_push.py -k refuses_head"),
    Mutation("a blob that is refused whole is sent in chunks", "cachedb/transports/registry/repository.py", "                if not is_whole:\n                    raise\n", "                raise\n", "tests/operations/test_push.py -k refuses_it_whole"),
    Mutation("a refusal of whole blobs is remembered", "cachedb/transports/registry/repository.py", "self._accepts_whole_blobs = is_whole = False", "is_whole = False", "tests/operations/test_push.py -k offered_all"),
    Mutation("an upload that cannot be cancelled is cancelled once", "cachedb/transports/registry/repository.py", "            self._deletes_uploads = False\n", "", "tests/operations/test_push.py -k cannot_be_cancelled"),
    Mutation("the cancellation of an upload is not retried", "cachedb/transports/registry/repository.py", 'good=(204,), max_tries=1)', "good=(204,))", "tests/operations/test_push.py -k cannot_be_cancelled"),
    Mutation("a refused list of referrers is read from its tag", "cachedb/transports/registry/repository.py", "                if pages:\n                    raise\n", "                raise\n", "tests/operations/test_push.py -k tag_lists"),
    Mutation("a later page of referrers is not skipped", "cachedb/transports/registry/repository.py", "                if pages:\n                    raise\n", "", "tests/operations/test_push.py -k later_page"),
    Mutation("a refusal to list referrers is remembered", "cachedb/transports/registry/repository.py", "                self._has_referrers_api, failure = False, error  #", "                failure = error  #", "tests/operations/test_push.py -k tag_lists"),
    Mutation("a tag that gives the image itself is no list", "cachedb/transports/registry/repository.py", "if data and digest_of(data, digest) != digest else", "if data else", "tests/operations/test_push.py -k image_itself"),
    Mutation("a list that is null is empty", "cachedb/oci/manifests.py", "    if value is None and key in document:\n        return []  # Go writes an empty list so\n", "", "tests/operations/test_push.py -k null"),
    Mutation("a host gets lower case", "cachedb/oci/names.py", "            repository = f\"{lower}/{path}\"\n", "            pass\n", "tests/oci/test_names.py"),
    Mutation("an image of docker.io without a folder is in library", "cachedb/oci/names.py", "path if \"/\" in path else f\"library/{path}\"", "path", "tests/oci/test_names.py"),
    Mutation("a better platform that is not stored is not replaced", "cachedb/oci/closure.py", "[*labels.items(), *((blob, blob.platform) for blob in absent)]", "labels.items()", "tests/oci/test_closure.py"),
    Mutation("requests refused at once ask for one token", "cachedb/transports/registry/authorization.py", "                return \"changed\"  # the new token may still lack our scope; then the caller asks again\n", "                pass\n", "tests/transports/registry/test_client.py -k token"),
    Mutation("a request refused with a new token asks for no other", "cachedb/transports/registry/client.py", "may_ask = is_ours and not has_asked and tries < TRIES\n", "may_ask = is_ours and tries < TRIES\n", "tests/transports/registry/test_client.py -k token"),
    Mutation("the last allowed redirect is followed", "cachedb/transports/registry/client.py", "        for _ in range(_MAX_REDIRECTS + 1):\n", "        for _ in range(_MAX_REDIRECTS):\n", "tests/transports/registry/test_client.py -k redirects"),
    Mutation("the longest allowed pause is made", "cachedb/transports/registry/client.py", "        if seconds > _MAX_PAUSE_SECONDS:\n", "        if seconds >= _MAX_PAUSE_SECONDS:\n", "tests/transports/registry/test_client.py -k minute"),
    Mutation("the largest allowed body is read", "cachedb/transports/registry/answers.py", "            if len(data) > limit:\n", "            if len(data) >= limit:\n", "tests/transports/registry/test_client.py -k largest"),
    Mutation("a complete download sends no request", "cachedb/transports/registry/download.py", "if self._response is None and self._at >= self._size:", "if self._response is None and self._at > self._size:", "tests/transports/registry/test_client.py -k download"),
    Mutation("the end of a download is no error", "cachedb/transports/registry/download.py", "if not data and self._at < self._size:", "if not data and self._at <= self._size:", "tests/transports/registry/test_client.py -k download"),
    Mutation("an upload of which all bytes arrived is resumed", "cachedb/transports/registry/repository.py", "if range_ and 0 < int(range_[1]) < size:", "if range_ and 0 < int(range_[1]) < size - 1:", "tests/transports/registry/test_client.py -k upload"),
    Mutation("no token is requested on the last try", "cachedb/transports/registry/client.py", "and not has_asked and tries < TRIES\n", "and not has_asked and tries <= TRIES\n", "tests/transports/registry/test_client.py -k token"),
    Mutation("pages of referrers have a limit", "cachedb/transports/registry/repository.py", "            pages += 1\n", "", "tests/transports/registry/test_client.py -k pages"),
    Mutation("the largest allowed number of referrers is listed", "cachedb/transports/registry/repository.py", "            if max(len(found), pages) > _MAX_REFERRERS:\n", "            if max(len(found), pages) >= _MAX_REFERRERS:\n", "tests/transports/registry/test_client.py -k referrers"),
    Mutation("the largest allowed number of manifests refers to an image", "cachedb/operations/pull.py", "                if len(known) >= _MAX_MANIFESTS:\n", "                if len(known) > _MAX_MANIFESTS:\n", "tests/transports/registry/test_client.py -k refer"),
    Mutation("backups are made one at a time", "cachedb/index/sqlite/backups.py", '            stack.enter_context(locks.hold_lock(lock, wait))\n', "", "tests/index/sqlite/test_backups.py -k waits_for_the_first"),
    Mutation("a backup leaves no descriptor open", "cachedb/index/sqlite/backups.py", "        stack.callback(os.close, file)  #", "        #", "tests/index/sqlite/test_backups.py -k descriptor"),
    Mutation("a change of the schema that just fits the disk is made", "cachedb/index/sqlite/backups.py", "    if free < needed:", "    if free <= needed:", "tests/index/sqlite/test_backups.py -k needs"),
    Mutation("an index may lack platforms in an archive", "cachedb/transports/archive/contents.py", "any(present) or not children", "all(present)", "tests/transports/archive/test_layout.py -k lacks_are_absent"),
    Mutation("nothing may be missing in a tar that is cut short", "cachedb/transports/archive/contents.py", "        if not is_found and not self._has_end:\n", "        if False:\n", "tests/transports/archive/test_layout.py -k cut_short"),
    Mutation("a tar without an end is noticed", "cachedb/transports/archive/files.py", "        self.has_end = tar.has_end(descriptor, end)\n", "        self.has_end = True\n", "tests/attacks/test_bounds_of_input.py -k zeros_at_its_end"),
    Mutation("embedded content has a limit", "cachedb/transports/archive/contents.py", "            if self._embedded_length > _EMBEDDED_LIMIT:\n", "            if False:\n", "tests/transports/archive/test_layout.py -k embedded"),
    Mutation("embedded content is decoded once", "cachedb/transports/archive/contents.py", "section = self._decoded[blob.digest] = Section", "section = Section", "tests/transports/archive/test_layout.py -k decoded"),
    Mutation("a manifest that is also a layer needs its layers", "cachedb/transports/archive/contents.py", "        key = blob.digest, blob.role\n", '        key = blob.digest, ""\n', "tests/transports/archive/test_layout.py -k also_a_layer"),
    Mutation("the closure of a manifest has its layers", "cachedb/oci/closure.py", " or _is_required(child)]", "]", "tests/oci/test_closure.py -k left_out"),
    Mutation("the blobs of images that share them have a limit", "cachedb/transports/archive/contents.py", "        check_blob_count(self._blob_count)  #", "        #", "tests/transports/archive/test_layout.py -k share_them"),
    Mutation("a manifest that is not for the wanted platform may be absent", "cachedb/transports/archive/contents.py", "(root.platform or self.is_present(root)):", "self.is_present(root):", "tests/transports/archive/test_layout.py -k may_be_absent"),
    Mutation("a media type in a manifest is a text", "cachedb/oci/manifests.py", "    if value is not None and not isinstance(value, str):\n", "    if False:\n", "tests/oci/test_manifests.py -k no_text"),
    Mutation("an odd media type of a layer does not reach the index", "cachedb/oci/manifests.py", "return value if value and _MEDIA_TYPE.fullmatch(value) else _UNKNOWN_TYPE", "return value or _UNKNOWN_TYPE", "tests/oci/test_manifests.py -k odd"),
    Mutation("a config is never foreign", "cachedb/oci/manifests.py", 'return self.role == "layer" and ', "return ", "tests/transports/archive/test_layout.py -k never_foreign"),
    Mutation("a referrer that is not whole is not attached", "cachedb/transports/archive/layout.py", "        if is_whole(root):\n            whole", "        if True:\n            whole", "tests/transports/archive/test_layout.py -k not_whole"),
    Mutation("a list of referrers may be absent", "cachedb/transports/archive/layout.py", 'item.root.role == "index" and is_whole(item.root)', 'item.root.role == "index"', "tests/transports/archive/test_layout.py -k not_whole"),
    Mutation("a joined image has a valid index", "cachedb/transports/archive/layout.py", "    if fields != [2, oci.OCI_INDEX, entries] or", "    if fields[2] != entries or", "tests/transports/archive/test_layout.py -k no_index_is"),
    Mutation("a damaged image is not left out of an import", "cachedb/transports/archive/layout.py", "            if not may_be_damaged:\n                raise\n            damaged", "            damaged", "tests/transports/archive/test_names.py -k others_are_damaged"),
    Mutation("an incomplete image of a docker-archive is not left out of an import", "cachedb/transports/archive/read.py", "            if wanted.select is None:\n                raise\n", "", "tests/transports/archive/test_names.py -k others_are_incomplete"),
    Mutation("a damaged image cannot be selected", "cachedb/transports/archive/names.py", "        if selected.error:\n", "        if False:\n", "tests/transports/archive/test_names.py -k others_are"),
    Mutation("an index without the wanted platform is not chosen", "cachedb/oci/closure.py", "if child.platform is None and is_useful(child, depth)]", "if child.platform is None]", "tests/transports/archive/test_layout.py tests/operations/test_pull.py -k index_of_indexes"),
    Mutation("an index without the wanted platform is not stored", "cachedb/operations/pull.py", "        for digest in self._source.documents.keys() - reached:\n", "        for digest in ():\n", "tests/operations/test_pull.py -k index_of_indexes"),
    Mutation("nested indexes are searched to a limit", "cachedb/oci/closure.py", "        if depth > NESTING_LIMIT:\n", "        if False:\n", "tests/oci/test_closure.py -k nested"),
    Mutation("an index that several list is searched once", "cachedb/oci/closure.py", "        if child.digest not in reaches:\n", "        if True:\n", "tests/oci/test_closure.py -k nested"),
    Mutation("a name in manifest.json is not lost", "cachedb/transports/archive/read.py", "    for text in (text for texts", "    for text in () and (text for texts", "tests/transports/archive/test_names.py -k not_lost"),
    Mutation("signatures of a folder for dir: are reported", "cachedb/transports/archive/directory.py", 'if files.find("signature-1") is not None:', "if False:", "tests/transports/archive/test_directory.py -k signatures"),
    Mutation("manifest.json is a list beside index.json", "cachedb/transports/archive/read.py", "if manifest and index is None and", "if manifest and", "tests/transports/archive/test_names.py -k beside"),
    Mutation("a bare tag beside a name replaces no image", "cachedb/transports/archive/names.py", "bare=tuple(bare))", "bare=() if names else tuple(bare))", "tests/transports/archive/test_names.py -k bare_tag"),
    Mutation("a name of several images selects none", "cachedb/transports/archive/names.py", "    if len(named) > 1:\n", "    if False:\n", "tests/transports/archive/test_names.py -k several_images_selects"),
    Mutation("a file name in an archive can be encoded", "cachedb/transports/archive/files.py", "with suppress(UnicodeEncodeError):", "if True:", "tests/transports/archive/test_read.py -k invalid_file_name"),
    Mutation("indexes in an archive are nested to a limit", "cachedb/transports/archive/contents.py", "        if depth > NESTING_LIMIT:\n", "        if False:\n", "tests/transports/archive/test_layout.py -k nested"),
    Mutation("only a layer with URLs is foreign", "cachedb/oci/manifests.py", "bool(self.urls) and is_foreign_type", "is_foreign_type", "tests/transports/archive/test_layout.py -k without_urls"),
    Mutation("only the wanted platform of an image is imported", "cachedb/transports/archive/contents.py", "        if self._platform is None or blob.role != \"index\":\n", "        if True:\n", "tests/transports/archive/test_layout.py -k only_the_wanted"),
    Mutation("a manifest for another platform is not imported", "cachedb/transports/archive/contents.py", "            if label and not oci.is_for(label, self._platform):\n", "            if False:\n", "tests/transports/archive/test_layout.py -k other_platforms"),
    Mutation("a docker-archive's image for another platform is not imported", "cachedb/transports/archive/read.py", "            elif wanted.platform and config.platform and not is_for(config.platform, wanted.platform):\n", "            elif False:\n", "tests/transports/archive/test_layout.py -k other_platforms"),
    Mutation("manifests for one platform do not become one image", "cachedb/transports/archive/layout.py", "    return len(platforms) == len(group) and None not in platforms\n", "    return True\n", "tests/transports/archive/test_layout.py -k do_not_become"),
    Mutation("a referrer of a referrer is attached", "cachedb/transports/archive/layout.py", "            known.update(root.digest for root in ready)\n", "", "tests/transports/archive/test_layout.py -k its_own"),
    Mutation("an image that only manifest.json lists is imported", "cachedb/transports/archive/read.py", "            if config.digest in covered:\n", "            if True:\n", "tests/transports/archive/test_names.py -k only_manifest_json"),
    Mutation("unnamed images are reported", "cachedb/transports/archive/names.py", "    if unnamed:\n        LOG", "    if False:\n        LOG", "tests/transports/archive/test_names.py -k reported"),
    Mutation("a bare tag replaces no image", "cachedb/operations/import_archive.py", "    if name in item.bare:\n", "    if False:\n", "tests/transports/archive/test_names.py -k never_replaces"),
    Mutation("an import replaces no name if told so", "cachedb/operations/import_archive.py", "    if not replace:\n", "    if False:\n", "tests/transports/archive/test_names.py -k reported_or_refused"),
    Mutation("a partial import keeps the platforms that are stored", "cachedb/operations/import_archive.py", "image.chosen | find_stored_part(connection, directory, name, digest)", "image.chosen", "tests/transports/archive/test_layout.py -k kept_together"),
    Mutation("a platform that a partial import leaves out is not attached", "cachedb/content/save.py", "if blob.digest not in known and (blob.stored or blob.digest not in left_out)", "if blob.digest not in known", "tests/transports/archive/test_layout.py -k completes"),
    Mutation("a recovered index may lack platforms", "cachedb/operations/rebuild.py", "1 if part else None, part or []", "None, []", "tests/operations/test_rebuild.py -k all_its_platforms"),
    Mutation("a platform without foreign layers is complete", "cachedb/content/save.py", "blobs.get(blob.digest, blob.is_foreign)", "blobs.get(blob.digest, False)", "tests/operations/test_pull.py -k foreign_layers_are_left_out"),
    Mutation("a file that links to itself is kept", "cachedb/transports/archive/files.py", "name in self._files and name == ", "False and name == ", "tests/transports/archive/test_read.py -k link_of_a_file_to_itself"),
    Mutation("a link out of an archive is not followed", "cachedb/transports/archive/files.py", "        if last in self._outside:\n", "        if False:\n", "tests/transports/archive/test_read.py -k leaves_the_archive"),
    Mutation("a link leads to a file from its folder first", "cachedb/transports/archive/files.py", "if self._follow_links(name) not in self._files and target in self._files:", "if target in self._files:", "tests/transports/archive/test_read.py -k taken_from_the_top"),
    Mutation("a layout's folder is read only if it holds everything", "cachedb/transports/archive/files.py", 'name.startswith(f"{folder}/") for name in names', "True for name in names", "tests/transports/archive/test_read.py -k beside_other_files"),
    Mutation("garbage does not hide that an archive is cut short", "cachedb/transports/archive/files.py", "                if has_garbage and not files.has_end:\n", "                if False:\n", "tests/transports/archive/test_read.py -k in_place_of_the_rest"),
    Mutation("garbage is what follows a complete member", "cachedb/transports/archive/compression.py", "if self._may_have_garbage and self._has_member:", "if self._may_have_garbage:", "tests/transports/archive/test_read.py -k no_complete_member"),
    Mutation("a compressed layer has no garbage behind it", "cachedb/transports/archive/compression.py", "if self._may_have_garbage and", "if self._compression == \"gzip\" and", "tests/transports/archive/test_read.py -k behind_a_compressed_layer"),
    Mutation("a digest in manifest.json is not taken for the built manifest's", "cachedb/transports/archive/names.py", "if item.image.root is None and (by_digest :=", "if False and (by_digest :=", "tests/transports/archive/test_names.py -k names_another_manifest"),
    Mutation("an archive with too long names is refused", "cachedb/transports/archive/files.py", "            if name_characters > _NAMES_LIMIT:\n", "            if False:\n", "tests/transports/archive/test_read.py -k megabytes"),
    Mutation("a marker that is being finished is no copy", "cachedb/disk/marker.py", "        if (status.st_ino, status.st_nlink) == (before.st_ino, before.st_nlink):\n", "        if True:\n", "tests/disk/test_identity.py -k is_finishing"),
    Mutation("an archive with too many members is refused", "cachedb/transports/archive/files.py", ">= _MEMBERS_LIMIT:", "> _MEMBERS_LIMIT:", "tests/attacks/test_bounds_of_input.py -k members"),
    Mutation("up to 40 links in an archive are followed", "cachedb/transports/archive/files.py", "range(_LINKS_LIMIT + 1)", "range(_LINKS_LIMIT)", "tests/attacks/test_bounds_of_input.py -k links"),
    Mutation("extended headers have a common limit", "cachedb/transports/archive/tar.py", "            extended_length += size + BLOCK\n", "", "tests/attacks/test_bounds_of_input.py -k headers"),
    Mutation("the largest document is read", "cachedb/oci/manifests.py", "    if size > DOCUMENT_LIMIT:", "    if size >= DOCUMENT_LIMIT:", "tests/attacks/test_bounds_of_input.py -k largest"),
    Mutation("the largest credentials file is read", "cachedb/transports/registry/credentials.py", "if len(data) <= _FILE_LIMIT else None", "if len(data) < _FILE_LIMIT else None", "tests/attacks/test_bounds_of_input.py -k credentials"),
    Mutation("the longest answer of a credential helper is read", "cachedb/transports/registry/credentials.py", "while len(answer) <= _ANSWER_LIMIT:", "while len(answer) < _ANSWER_LIMIT:", "tests/attacks/test_bounds_of_input.py -k helper"),
    Mutation("a partial download is kept for a day", "cachedb/disk/downloads.py", "_STALE_SECONDS = 24 * 60 * 60", "_STALE_SECONDS = 24 * 60 * 59", "tests/attacks/test_bounds_of_input.py -k download"),
    Mutation("a complete partial download is resumed", "cachedb/disk/downloads.py", "found.st_size > size or", "found.st_size >= size or", "tests/attacks/test_bounds_of_input.py -k download"),
    Mutation("the longest allowed hold is made", "cachedb/index/holds.py", "not 0 < seconds <= _LONGEST_HOLD.total_seconds():", "not 0 < seconds < _LONGEST_HOLD.total_seconds():", "tests/attacks/test_bounds_of_input.py -k hold"),
    Mutation("uses are written at most every five minutes", "cachedb/content/last_used.py", "- self._written > RESOLUTION", "- self._written >= RESOLUTION", "tests/attacks/test_bounds_of_input.py -k uses"),
    Mutation("a size is printed with at most three digits", "cachedb/text.py", "if abs(size) < 999.5", "if abs(size) < 1000", "tests/attacks/test_bounds_of_input.py -k unit"),
    Mutation("`show` prints the author", "cachedb/cli/images.py", ', ("author", image.author or "")]', "]", "tests/attacks/test_bounds_of_input.py -k author"),
    # Second failures
    Mutation("the widths of a format are added up", "cachedb/index/sqlite/query.py", "            size += _absolute(", "            size = _absolute(", "tests/index/sqlite/test_query.py -k size_of_a_format"),
    Mutation("a query that is stuck ends after its time", "cachedb/cli/step_watcher.py", "            elif self._is_in_step and self._step == stuck:\n", "            elif False:\n", "tests/cli/test_step_watcher.py -k after_its_time"),
    Mutation("a query that is stuck ends on a signal", "cachedb/cli/step_watcher.py", "                if received[0] not in (signal.SIGINT, signal.SIGTERM):\n", "                if True:\n", "tests/cli/test_step_watcher.py -k on_a_signal"),
    Mutation("a slow reader stops no query", "cachedb/cli/step_watcher.py", "            elif self._is_in_step and self._step == stuck:\n", "            else:\n", "tests/cli/test_step_watcher.py -k slow_reader"),
    Mutation("a query runs where no thread can be started", "cachedb/cli/step_watcher.py", "            if is_started:\n", "            if True:\n", "tests/cli/test_step_watcher.py -k no_thread"),
    # The same line as in "a pushed manifest is verified", other tests.
    Mutation("a manifest is verified before it is returned", "cachedb/disk/reader.py", "    if digest_of(data, digest) != digest:\n        raise", "    if False:\n        raise", "tests/test_cache.py -k damaged_manifest"),
    Mutation("a lock changes no file that has another name", "cachedb/disk/locks.py", "    if os.fstat(file).st_nlink > 1:\n", "    if False:\n", "tests/disk/test_locks.py -k second_name"),
    Mutation("the replaced index belongs to the group", "cachedb/disk/durable.py", "        apply_folder_mode(copy.fileno(), os.fstat(folder))\n", "", "tests/operations/test_share.py -k replaced_index"),
    Mutation("a text with a NUL or a surrogate is refused", "cachedb/arguments.py", "            _check_encoding(name, value, str.encode)\n", "            pass\n", "tests/test_arguments.py -k impossible"),
    Mutation("a path with a NUL or a surrogate is refused", "cachedb/arguments.py", "            _check_encoding(name, os.fspath(value), os.fsencode)\n        elif not (optional", "            pass\n        elif not (optional", "tests/test_arguments.py -k impossible"),
    Mutation("the path of a file with a NUL or a surrogate is refused", "cachedb/arguments.py", "            _check_encoding(name, os.fspath(value), os.fsencode)\n        elif not has", "            pass\n        elif not has", "tests/test_arguments.py -k impossible"),
    Mutation("a failed export reports the first error", "cachedb/disk/durable.py", "        with ignore_os_errors():  # an error here would hide the first one\n            part.unlink(missing_ok=True)\n", "        part.unlink(missing_ok=True)\n", "tests/attacks/test_second_failures.py -k export"),
    Mutation("a failed link reports the first error", "cachedb/transports/archive/write_layout.py", "        discard(part)  #", "        part.unlink(missing_ok=True)  #", "tests/attacks/test_second_failures.py -k export"),
    Mutation("a failed import reports the first error", "cachedb/content/session.py", "discard(name, folder.descriptor)", "os.unlink(name, dir_fd=folder.descriptor)", "tests/attacks/test_second_failures.py -k spooled"),
    Mutation("a failed backup reports the first error", "cachedb/index/sqlite/backups.py", "                with ignore_os_errors():\n                    made.unlink()\n", "                made.unlink()\n", "tests/attacks/test_second_failures.py -k backup"),
    Mutation("a refused blob reports the first error", "cachedb/disk/writer.py", "    with ignore_os_errors():\n        os.unlink(path, dir_fd=folder)\n", "    os.unlink(path, dir_fd=folder)\n", "tests/attacks/test_second_failures.py -k blob"),
    Mutation("a failed change of the schema reports the first error", "cachedb/index/schema.py", "                with ignore_os_errors():\n                    database.folders.remove(f\"backups/{backup.name}\")\n", "                database.folders.remove(f\"backups/{backup.name}\")\n", "tests/attacks/test_second_failures.py -k schema"),
    Mutation("a failed publication reports the first error", "cachedb/content/publish.py", "            with suppress(CacheError):  # the next open", "            if True:  # the next open", "tests/attacks/test_second_failures.py -k publication"),
    Mutation("a failed pull reports the first error", "cachedb/operations/pull.py", "            with suppress(CacheError), ignore_os_errors():\n", "            if True:\n", "tests/attacks/test_second_failures.py -k pull"),
    Mutation("failed work reports the first error", "cachedb/disk/single_flight.py", "        with ignore_os_errors():  # the next open removes it\n", "        if True:\n", "tests/attacks/test_second_failures.py -k work"),
    Mutation("the error for a damaged backup names the damage", "cachedb/operations/restore.py", "is damaged, and was not restored: {faults[0]}", "is damaged, and was not restored", "tests/index/sqlite/test_backups.py -k damage"),
    Mutation("the error for a backup without a schema says so", "cachedb/operations/restore.py", 'or "it has lost its schema"', 'or "?"', "tests/index/sqlite/test_backups.py -k damage"),
    # The tests themselves
    Mutation("the processes of a test end with the run", "tests/conftest.py", "    leftovers.start_watcher()\n", "", "tests/support/test_leftovers.py"),
    Mutation("a fork of a test run ends with the run", "tests/support/leftovers.py", '                if os.readlink(process / "fd" / file) == f"pipe:[{pipe}]":\n', "                if False:\n", "tests/support/test_leftovers.py"),
    Mutation("the mounts of a test end with the run", "tests/conftest.py", "    leftovers.isolate_mounts()\n", "", "tests/support/test_leftovers.py"),
    Mutation("a fault that no request meets fails its test", "tests/support/faults.py", "        assert kind or not missed, f", "        assert True, f", "tests/transports/registry/test_repository.py -k no_request_meets"),
    # Queries
    Mutation("only read-only queries are allowed", "cachedb/index/sqlite/query.py", "    connection.set_authorizer(_authorizer())\n", "", "tests/index/sqlite/test_query.py"),
    Mutation("only harmless functions can be called", "cachedb/index/sqlite/query.py", "if second in _FUNCTIONS and calls", "if calls", "tests/index/sqlite/test_query.py -k harmless"),
    Mutation("a query may call a limited number of functions", "cachedb/index/sqlite/query.py", " and calls <= _CALLS_LIMIT else", " else", "tests/index/sqlite/test_query.py -k functions"),
    Mutation("a value in a query has a size limit", "cachedb/index/sqlite/query.py", "        connection.setlimit(limit, value)\n", "        pass\n", "tests/index/sqlite/test_query.py -k pattern"),
    Mutation("a search in a query takes linear time", "cachedb/index/sqlite/query.py", '    if _SLOW_CALL.search(_QUICK_CALL.sub("", query)):\n', "    if False:\n", "tests/index/sqlite/test_query.py -k uses_our_functions"),
    Mutation("the size of a replacement is checked before it is made", "cachedb/index/sqlite/query.py", "    if len(where) + where.count(old) * (len(new) - len(old)) >", "    if 0 >", "tests/index/sqlite/test_query.py -k value_has_a_size"),
    Mutation("a query of slow steps is interrupted in time", "cachedb/index/sqlite/query.py", "_CHECK_OPCODES = 2_000 ", "_CHECK_OPCODES = 2_000_000 ", "tests/index/sqlite/test_query.py -k long_steps"),
    Mutation("no cell is a formula", "cachedb/cli/output.py", "    if value.startswith(_FORMULA) and", "    if False and", "tests/index/sqlite/test_query.py -k formula"),
    Mutation("a number in a cell stays a number", "cachedb/cli/output.py", " and not _NUMBER.fullmatch(value):", ":", "tests/index/sqlite/test_query.py -k number"),
    Mutation("a cell of Markdown contains no HTML", "cachedb/cli/output.py", "html.escape(re.sub", "str(re.sub", "tests/index/sqlite/test_query.py -k markdown"),
    Mutation("a terminal gets no escape sequence in a cell", "cachedb/cli/output.py", "return printable(value) if is_terminal else value", "return value", "tests/index/sqlite/test_query.py -k terminal"),
    Mutation("only its user may read the history of the prompt", "cachedb/cli/sql_prompt.py", "            os.fchmod(file, 0o600)\n", "", "tests/cli/test_sql_prompt.py -k history"),
    Mutation("the history of the prompt is written through no link", "cachedb/cli/sql_prompt.py", " | os.O_NOFOLLOW", "", "tests/cli/test_sql_prompt.py -k history"),
    Mutation("an interrupt does not end the prompt", "cachedb/cli/sql_prompt.py", "            received_signals.clear()  # it", "            raise  # it", "tests/cli/test_sql_prompt.py -k interrupt"),
    Mutation("a suggested name is in scope", "cachedb/index/sqlite/mistakes.py", " and name not in changed)", ")", "tests/index/sqlite/test_query.py -k suggests"),
    Mutation("a suggested column is one of the qualifier's table", "cachedb/index/sqlite/mistakes.py", "            if changed is None or", "            if True or", "tests/index/sqlite/test_query.py -k suggests"),
    Mutation("a connection for queries is read-only", "cachedb/index/sqlite/query.py", '    connection.execute("PRAGMA query_only = ON")\n', "", "tests/index/sqlite/test_query.py"),
    Mutation("noting a use waits for no lock", "cachedb/index/sqlite/database.py", "else locks.acquire(self.write_lock, wait=False)\n", "else locks.acquire(self.write_lock)\n", "tests/content/test_last_used.py"),
    # The HTML page
    Mutation("a held image is not proposed for removal", "cachedb/reports/cleanup.py", " AND NOT EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = m.digest)\n", "\n", "tests/reports/test_cleanup.py"),
    Mutation("a held blob does not count as freed", "cachedb/reports/cleanup.py", "            AND NOT EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = b.digest)\n", "", "tests/reports/test_cleanup.py -k frees_what"),
    Mutation("a blob of a kept image does not count as freed", "cachedb/reports/cleanup.py", "            AND NOT EXISTS (SELECT 1 FROM image_blobs AS p WHERE p.blob_id = b.id AND p.image_id NOT IN :chosen)\n", "", "tests/reports/test_cleanup.py -k frees_what"),
    Mutation("a name that `rm` refuses is not proposed", "cachedb/reports/cleanup.py", '        return name if str(Name.parse(name)) == name else ""\n    except InvalidName:\n        return ""\n', "        return name\n    except InvalidName:\n        return name\n", "tests/reports/test_cleanup.py -k refuses"),
    Mutation("a command with a control character is not shown", "cachedb/reports/cleanup.py", "    if not all(word.isprintable() for word in words):\n", "    if False:\n", "tests/reports/test_cleanup.py -k quoted"),
    Mutation("the words of a command are quoted", "cachedb/reports/cleanup.py", "*map(shlex.quote, names)]", "*names]", "tests/reports/test_cleanup.py -k quoted"),
    Mutation("the data of the page's search ends no script", "cachedb/reports/page.py", '.replace("<", "\\\\u003c")', "", "tests/reports/test_page.py -k hostile"),
    Mutation("the page shows each platform of an image", "cachedb/reports/image_table.py", '"SELECT name, os, architecture, variant FROM platforms"', '"SELECT name, os, architecture, variant FROM image_usage"', "tests/reports/test_page.py -k several_platforms"),
    Mutation("no name in the map covers a heading", "cachedb/reports/treemap.py", "        if _overlap(label, heading):\n", "        if False:\n", "tests/reports/test_treemap.py"),
    # Results of the library
    Mutation("a count for a report is not negative", "cachedb/reports/parameters.py", 're.fullmatch("[0-9]{1,18}", text)', 're.fullmatch("-?[0-9]{1,18}", text)', "tests/reports/test_named.py -k wrong_type"),
    Mutation("days for a report are not negative", "cachedb/reports/parameters.py", "if 0 <= (days := float(text)) < math.inf:", "if (days := float(text)) < math.inf:", "tests/reports/test_named.py -k wrong_type"),
    Mutation("an absent image is a wrong value for a report", "cachedb/reports/parameters.py", '            raise InvalidQuery(f"invalid value of {parameter.name!r}: {error}") from error\n', "            raise\n", "tests/reports/test_named.py -k wrong_type"),
    Mutation("to-free counts a blob with the last image that has it", "cachedb/reports/sql/to-free.sql", "max(r.place)", "min(r.place)", "tests/reports/test_named.py -k to_free"),
    Mutation("to-free counts no held blob", "cachedb/reports/sql/to-free.sql", "        AND b.id NOT IN (SELECT h.id FROM leases AS l CROSS JOIN blobs AS h ON h.digest = l.digest)\n", "", "tests/reports/test_named.py -k to_free"),
    Mutation("to-free lists no image that the size does not need", "cachedb/reports/sql/to-free.sql", "r.total - r.size < :size", "r.total - r.size <= :size", "tests/reports/test_named.py -k to_free"),
    Mutation("usage-by counts a blob once", "cachedb/reports/sql/usage-by.sql", "SELECT DISTINCT o.blob_id", "SELECT o.blob_id", "tests/reports/test_named.py tests/reports/test_sums.py -k 'usage_by or sums'"),
    Mutation("unreferenced blobs are counted", "cachedb/reports/usage.py", "if used < known else Collected(0, 0)", "if False else Collected(0, 0)", "tests/test_cache.py"),
    Mutation("incomplete images are counted", "cachedb/reports/usage.py", "if blob_count < known else 0", "if False else 0", "tests/test_cache.py"),
    Mutation("an imported blob that is stored already is leased", "cachedb/content/publish.py", "            return session.lease(connection, find_intact(connection, database.directory, found))\n", "            return Hold('', 0, frozenset(find_intact(connection, database.directory, found)))\n", "tests/test_cache.py tests/attacks/test_interleavings.py tests/content/test_session.py"),
    Mutation("a blob is leased until its image is saved", "cachedb/content/publish.py", "                    hold = session.lease(connection, [received.digest])\n", "                    pass\n", "tests/test_cache.py tests/content/test_session.py"),
    # The same line as in "a pushed blob is leased", other tests.
    Mutation("an exported blob is leased", "cachedb/content/held.py", "        hold = NO_HOLD if read_only else session.lease(connection, digests)\n", "        hold = NO_HOLD\n", "tests/test_cache.py tests/attacks/test_interleavings.py"),
    Mutation("only one of many processes produces an image", "cachedb/disk/single_flight.py", "            found = find()\n            if found is None:\n                if is_working", "            found = None\n            if found is None:\n                if is_working", "tests/disk/test_single_flight.py"),
    Mutation("a file that is truncated during an export is an error", "cachedb/transports/archive/copy_blob.py", "                if not count:\n                    raise CacheError", "                if not count:\n                    return\n                if not count:\n                    raise CacheError", "tests/transports/archive/test_write.py -k short"),
    Mutation("an exported blob is verified", "cachedb/transports/archive/copy_blob.py", '    if f"{hasher.name}:{hasher.hexdigest()}" != digest:\n', "    if False:\n", "tests/transports/archive/test_write.py -k another_content"),
    Mutation("a blob that an export links is verified", "cachedb/transports/archive/write_layout.py", "            read_blob(entry, file, None, progress)\n        finally", "            pass\n        finally", "tests/transports/archive/test_write.py -k another_content"),
    Mutation("a full disk is not taken for a lack of reflinks", "cachedb/disk/durable.py", "error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):", "False:", "tests/disk/test_durable.py -k cloned"),
    Mutation("an error of the caller is not taken for a lack of reflinks", "cachedb/disk/durable.py", "        if is_callers(error) or error.errno in (errno.ENOSPC", "        if error.errno in (errno.ENOSPC", "tests/disk/test_durable.py -k cloned"),
    Mutation("a blob that an export clones is verified", "cachedb/transports/archive/write_layout.py", "    read_blob(entry, target, None, progress)\n", "", "tests/transports/archive/test_write.py -k cloned"),
    Mutation("a folder that is removed while an export waits is made again", "cachedb/transports/archive/write_layout.py", "        except FileNotFoundError:  # an export", "        except NotImplementedError:  # an export", "tests/transports/archive/test_write.py -k makes_the_folder_again"),
    Mutation("an export waits for another only for a while", "cachedb/transports/archive/write_layout.py", "_lock_folder(stack, destination, wait_seconds)", "_lock_folder(stack, destination, 2.0)", "tests/transports/archive/test_write.py -k only_as_long"),
    Mutation("an export waits while another makes progress", "cachedb/transports/archive/write_layout.py", "wait_seconds, lambda: _read_progress(destination)", "wait_seconds, None", "tests/transports/archive/test_write.py -k makes_progress"),
    Mutation("an export that cannot show its progress goes on", "cachedb/transports/archive/write_layout.py", "            with suppress(OSError):  # waiting", "            if True:  # waiting", "tests/transports/archive/test_write.py -k cannot_show"),
    Mutation("an export into a layout shows its progress", "cachedb/transports/archive/write_layout.py", "                os.utime(destination)\n", "                pass\n", "tests/transports/archive/test_write.py -k shows_its_progress"),
    Mutation("a wait for a layout ends when the export begins", "cachedb/transports/archive/write_layout.py", "            wait.end()\n", "", "tests/transports/archive/test_write.py -k when_the_export_begins"),
    Mutation("a wait for a backup ends when this one begins", "cachedb/index/sqlite/backups.py", "            wait.end()\n", "", "tests/index/sqlite/test_backups.py -k when_this_one_begins"),
    Mutation("a backup waits as long as the cache allows", "cachedb/index/sqlite/backups.py", "database.wait_seconds, lambda", "2.0, lambda", "tests/index/sqlite/test_backups.py -k only_as_long"),
    Mutation("a failed export into a folder is undone", "cachedb/transports/archive/write_layout.py", "            _remove(made)\n", "", "tests/transports/archive/test_write.py -k 'another_content or stays_as_it_was'"),
    Mutation("a symbolic link in blobs/ is not followed", "cachedb/disk/reader.py", " | os.O_NOFOLLOW", "", "tests/transports/archive/test_write.py -k symbolic_link"),
    Mutation("a pushed blob is verified", "cachedb/transports/registry/upload.py", '        if self._hashed == self._size and f"', '        if False and f"', "tests/operations/test_push.py -k damaged"),
    Mutation("the unpacked size of an archive has a limit", "cachedb/transports/archive/files.py", "                limit.add(len(part))\n", "", "tests/transports/archive/test_read.py -k 'unpacks or raised'"),
    Mutation("the unpacked size of layers has a limit", "cachedb/transports/archive/diff_ids.py", "            self._limit.add(len(part))\n", "", "tests/transports/archive/test_read.py -k unpack"),
    Mutation("the ratio of unpacked to packed size has a limit", "cachedb/transports/archive/files.py", "if self._most is not None or by_ratio > _UNPACKED_LIMIT:", "if True:", "tests/transports/archive/test_read.py -k many_times"),
    Mutation("unpacking leaves free space for others", "cachedb/transports/archive/files.py", "    if written > _SPACE_SHARE * left:\n", "    if False:\n", "tests/transports/archive/test_read.py -k space"),
    Mutation("an error names a path that is too long for SQLite", "cachedb/index/sqlite/prepare.py", " or explain_path_limit(database.path):", ":", "tests/index/sqlite/test_database.py -k too_long"),
    Mutation("the length of a path counts with its links resolved", "cachedb/index/sqlite/errors.py", "max(len(os.fsencode(path)), len(os.fsencode(os.path.realpath(path))))", "len(os.fsencode(path))", "tests/index/sqlite/test_database.py -k symbolic"),
    Mutation("a path in the index is not moved to the trash", "cachedb/content/collect.py", "in stored_again or not is_digest(digest):", "in stored_again:", "tests/content/test_collect.py -k names_a_path"),
    Mutation("a path in the index gets no trash row", "cachedb/content/collect.py", " and is_digest(row.digest)]", "]", "tests/content/test_collect.py -k names_a_path"),
    Mutation("a path in the index is not taken for a digest", "cachedb/disk/layout.py", "    if not is_digest(digest):\n", "    if False:\n", "tests/content/test_collect.py -k damaged"),
    Mutation("an export is synced before it gets its name", "cachedb/disk/durable.py", "            os.fsync(file.fileno())\n            if", "            if", "tests/transports/archive/test_write.py"),
    # Policies
    Mutation("a rule without conditions is refused", "cachedb/operations/policy.py", "        if not table:\n", "        if False:\n", "tests/operations/test_policy.py -k mistake"),
    Mutation("a part of no limit is refused", "cachedb/operations/policy.py", "if \"down-to\" in limits and parsed.max_size is None:", "if False:", "tests/operations/test_policy.py -k mistake"),
    Mutation("an unknown key of a policy is refused", "cachedb/operations/policy.py", "            raise _Mistake(f\"unknown key {shorten(key)}: use {_list_keys(keys)}\", *path, key)\n", "            continue\n", "tests/operations/test_policy.py -k mistake"),
    Mutation("an unknown table of a policy is refused", "cachedb/operations/policy.py", "if key not in (\"limits\", \"keep\", \"remove\"):", "if False:", "tests/operations/test_policy.py -k mistake"),
    Mutation("an empty list of names is refused", "cachedb/operations/policy.py", "if isinstance(value, list) and not value:", "if False:", "tests/operations/test_policy.py -k mistake"),
    Mutation("an open bracket in a pattern is refused", "cachedb/operations/policy.py", "    if \"[\" in re.sub(", "    if False and re.sub(", "tests/operations/test_policy.py -k mistake"),
    Mutation("a policy that is a link is not read", "cachedb/operations/policy.py", "with open(directory / POLICY_FILE, \"rb\", opener=open_regular) as file:", "with open(directory / POLICY_FILE, \"rb\") as file:", "tests/operations/test_policy.py -k no_regular"),
    Mutation("the size of a policy is limited", "cachedb/operations/policy.py", "    if len(data) > _MAX_BYTES:\n        raise InvalidPolicy(f\"{POLICY_FILE} has", "    if False:\n        raise InvalidPolicy(f\"{POLICY_FILE} has", "tests/operations/test_policy.py -k no_text"),
    Mutation("the queries of a policy are checked", "cachedb/operations/policy.py", "        if query is not None:\n", "        if False:\n", "tests/operations/test_policy.py -k query"),
    Mutation("an invalid policy is not installed", "cachedb/operations/policy.py", "policy, data = check_policy(database, text), text.encode()", "policy, data = Policy(), text.encode()", "tests/operations/test_policy.py -k installed"),
    Mutation("a link in the place of a copied policy is not replaced", "cachedb/operations/copy.py", "        unknown -= {POLICY_FILE} if _is_leftover(directory / POLICY_FILE) else set()\n", "        unknown -= {POLICY_FILE}\n", "tests/operations/test_copy.py -k policy"),
    Mutation("a change of the policy during an edit is noticed", "cachedb/cli/prune.py", "        if read_policy(cache.directory) != before:\n", "        if False:\n", "tests/cli/test_prune.py -k another_process"),
    Mutation("an installed policy has the mode of the cache", "cachedb/operations/policy.py", "            apply_folder_mode(file.fileno(), folders.status)\n", "            pass\n", "tests/operations/test_policy.py -k mode_of"),
    # Verification
    Mutation("an interrupt stops the threads", "cachedb/threads.py", "        stopped.set()\n", "", "tests/test_threads.py tests/operations/test_verify.py"),
    Mutation("a fault found without the lock is checked again", "cachedb/operations/verify.py", "            if reading and (status is None or reading.file != file_identity(status)):\n", "            if False:\n", "tests/operations/test_verify.py"),
    Mutation("a blob that is being collected is no orphan", "cachedb/operations/verify.py", "        in_transit.update(map(Digest, connection.execute(collected).scalars()))\n", "", "tests/operations/test_verify.py"),
    Mutation("a damaged file is kept in quarantine/", "cachedb/operations/verify.py", "                os.link(path, kept.name, dst_dir_fd=quarantine, follow_symlinks=False)\n", "                pass\n", "tests/operations/test_verify.py tests/attacks/test_crashes.py"),
    Mutation("an old WAL is not applied to a new index", "cachedb/index/sqlite/replace.py", "            os.rename(wal.name, kept, src_dir_fd=folders.root, dst_dir_fd=quarantine)\n", "            old.with_name(kept).touch()\n", "tests/operations/test_rebuild.py"),
    Mutation("an old index's shared memory is removed", "cachedb/index/sqlite/replace.py", "        folders.remove(\"index.db-shm\")\n", "", "tests/operations/test_rebuild.py"),
    Mutation("no process opens an index that is being replaced", "cachedb/index/sqlite/file.py", "wait, shared=not replacing", "wait, shared=True", "tests/index/sqlite/test_database.py"),
    Mutation("the WAL of a replaced index is written back", "cachedb/index/sqlite/replace.py", "            _write_back(database)\n", "            pass\n", "tests/index/sqlite/test_database.py tests/attacks/test_crashes.py tests/operations/test_upgrade.py"),
    Mutation("a new index has no WAL of its own when it gets the name", "cachedb/index/sqlite/backups.py", '    if new.with_name(f"{new.name}-wal").exists():\n', "    if False:\n", "tests/operations/test_rebuild.py tests/index/sqlite/test_database.py"),
    Mutation("docker load gets the host's platform of an index", "cachedb/operations/export_archive.py", "        images.sort(", "        sorted(images, ", "tests/transports/archive/test_write.py -k hosts_platform"),
    Mutation("docker load gets an image of an index without the host's platform", "cachedb/operations/export_archive.py", "    return next(iter(images), None)\n", "    return next((image for image in images if len(images) == 1 or is_for(platforms[image], host_platform())), None)\n", "tests/transports/archive/test_write.py -k hosts_platform"),
    Mutation("an export tells of referrers that are left out", "cachedb/operations/export_archive.py", "        _warn_of_referrers(directory, name, whole, blobs, format)\n", "        pass\n", "tests/transports/archive/test_write.py -k referrer"),
    Mutation("an export tells of referrers whose subject is not exported", "cachedb/operations/export_archive.py", "    _warn_of_left_out(name, len(referrers) - len(found)", "    (name, len(referrers) - len(found)", "tests/transports/archive/test_write.py -k referrer"),
    Mutation("a referrer that is not exported may be damaged", "cachedb/operations/export_archive.py", 'read_small_blob(directory, digest, sizes[digest]) or b""', "read_document(directory, digest)", "tests/transports/archive/test_write.py -k referrer"),
    Mutation("a referrer that is not exported may be invalid", "cachedb/operations/export_archive.py", "    with suppress(InvalidManifest):\n", "    if True:\n", "tests/transports/archive/test_write.py -k referrer"),
    Mutation("a docker-archive holds no referrers", "cachedb/operations/export_archive.py", 'if referrers and format in MANIFEST_FORMATS:', "if False:", "tests/transports/archive/test_write.py -k referrer"),
    Mutation("a referrer is exported with its config and layers", "cachedb/oci/closure.py", 'child.role in ("config", "layer") or child.digest in data', "child.digest in data", "tests/transports/archive/test_write.py -k referrers"),
    Mutation("a referrer of another image is not exported", "cachedb/oci/closure.py", "if blob.digest not in known and subject in known]", "if blob.digest not in known]", "tests/transports/archive/test_write.py -k referrer"),
    Mutation("a layout lists a referrer once", "cachedb/transports/archive/merge_index.py", "if _read_name(entry) not in names and not _is_unnamed(entry, listed)]", "if _read_name(entry) not in names]", "tests/transports/archive/test_write.py -k referrer"),
    Mutation("a referrer in a layout stays while a name has its subject", "cachedb/transports/archive/merge_index.py", "_list_reached(folder, replaced) - _list_reached(folder, [*filter(_read_name, kept), *new])", "_list_reached(folder, replaced)", "tests/transports/archive/test_write.py -k replaced_with_its"),
    Mutation("a referrer of a referrer leaves a layout with it", "cachedb/transports/archive/merge_index.py", "        gone = gone | found\n", "        gone = gone | found\n        break\n", "tests/transports/archive/test_write.py -k replaced_with_its"),
    Mutation("an export tells of attached blobs that it lacks", "cachedb/operations/export_archive.py", "{blob.digest for blob in blobs} - known), \"other", "set()), \"other", "tests/transports/archive/test_write.py -k another_subject"),
    Mutation("an attestation names the converted manifest", "cachedb/oci/conversion.py", "[_update_attested(entry, digests) for entry in entries]", "entries", "tests/oci/test_conversion.py"),
    Mutation("an invalid annotation of an index is not converted", "cachedb/oci/conversion.py", "not isinstance(attested, str) or ", "", "tests/oci/test_conversion.py"),
    Mutation("an embedded copy of a converted manifest is dropped", "cachedb/oci/manifests.py", ' if key != "data" or entry["digest"] == child.digest}', "}", "tests/oci/test_conversion.py tests/oci/test_closure.py"),
    Mutation("a manifest that is a layer is not converted", "cachedb/oci/conversion.py", '_CONTENT_TYPES.get(blob.media_type, blob.media_type)', '{**_CONTENT_TYPES, **_DOCUMENT_TYPES}.get(blob.media_type, blob.media_type)', "tests/oci/test_conversion.py"),
    Mutation("converted manifests are not read from the cache", "cachedb/oci/conversion.py", "        made.add(digest)\n", "", "tests/transports/archive/test_write.py -k conver"),
    Mutation("an export tells of Docker media types", "cachedb/operations/export_archive.py", "    elif format not in MANIFEST_FORMATS and closure.root.media_type in", "    elif False and closure.root.media_type in", "tests/transports/archive/test_write.py -k docker_manifest"),
    Mutation("only manifests are converted", "cachedb/operations/export_archive.py", 'if convert and format == "docker-archive":', "if False:", "tests/transports/archive/test_write.py -k conversion"),
    Mutation("an unknown conversion is refused", "cachedb/operations/export_archive.py", 'if convert not in (None, "oci"):', "if False:", "tests/transports/archive/test_write.py -k conversion"),
    Mutation("a tag has the digest of the exported manifest", "cachedb/operations/export_archive.py", "if tag is not None and named.digest not in", "if False and named.digest not in", "tests/transports/archive/test_write.py -k invalid_tag"),
    Mutation("a folder for dir: holds no tag", "cachedb/operations/export_archive.py", 'if tag is not None and format == "dir":', "if False:", "tests/transports/archive/test_write.py -k dir_with"),
    Mutation("a folder that has a file called version is not taken for skopeo's", "cachedb/transports/archive/write_layout.py", ' and (marker.path == "oci-layout" or path.read_bytes() == marker.content)', "", "tests/transports/archive/test_write.py -k does_not_replace_another_folder"),
    Mutation("a folder for dir: has no signature of the image before", "cachedb/transports/archive/write_layout.py", "            _remove_replaced(destination, {entry.path for entry in files})\n", "            pass\n", "tests/transports/archive/test_write.py -k dir_is_replaced"),
    Mutation("an old file in a folder for dir: fails no export", "cachedb/transports/archive/write_layout.py", "            with suppress(OSError):  # the export", "            if True:  # the export", "tests/transports/archive/test_write.py -k cannot_be_removed_from_a_dir"),
    Mutation("foreign files in a folder for dir: stay", "cachedb/transports/archive/write_layout.py", "if name not in written and _IN_DIR.fullmatch(name):", "if name not in written:", "tests/transports/archive/test_write.py -k dir_is_replaced"),
    Mutation("a path with a colon is no transport", "cachedb/transports/archive/locations.py", "    if transport == text or transport not in _TRANSPORTS:\n", "    transport = transport.removeprefix(\"./\")\n    if transport == text or transport not in _TRANSPORTS:\n", "tests/transports/archive/test_locations.py"),
    Mutation("a transport does not contradict --format", "cachedb/cli/archives.py", "if location.format and form not in (None, location.format):", "if False:", "tests/transports/archive/test_write.py -k contradiction"),
    Mutation("docker load gets no artifact", "cachedb/operations/export_archive.py", "if closure.find_artifact_type(image) is None and not", "if not", "tests/transports/archive/test_write.py -k artifact"),
    Mutation("a docker-archive holds no artifact", "cachedb/operations/export_archive.py", 'if format == "docker-archive" and (kind :=', 'if False and (kind :=', "tests/transports/archive/test_write.py -k artifact"),
    Mutation("docker load gets no image that lacks foreign layers", "cachedb/operations/export_archive.py", "is None and not closure.lacks_layers(image)", "is None", "tests/transports/archive/test_write.py -k foreign"),
    Mutation("a docker-archive lacks no foreign layers", "cachedb/operations/export_archive.py", 'if format == "docker-archive" and closure.lacks_layers(closure.root):', "if False:", "tests/transports/archive/test_write.py -k foreign"),
    Mutation("a converted manifest lists the foreign layers that are not stored", "cachedb/oci/conversion.py", 'read_descriptors(document, blob.media_type, "the manifest")', "children[blob.digest]", "tests/oci/test_conversion.py tests/transports/archive/test_write.py -k foreign"),
    Mutation("a converted manifest has only the foreign layers that are stored", "cachedb/oci/conversion.py", " if old in kept]", "]", "tests/transports/archive/test_write.py -k foreign"),
    Mutation("an empty config is no image's", "cachedb/oci/closure.py", '"artifactType" in document and config.digest == _EMPTY_CONFIG', "False", "tests/transports/archive/test_write.py -k artifact"),
    Mutation("the config of an artifact may be anything", "cachedb/oci/closure.py", "            with suppress(InvalidManifest):  #", "            if True:  #", "tests/transports/archive/test_write.py -k artifact"),
    Mutation("an archive has members for its folders", "cachedb/transports/archive/write_tar.py", "        for folder in _folders(entry.path, known):\n", "        for folder in ():\n", "tests/transports/archive/test_write.py"),
    Mutation("a connection whose PRAGMA fails is closed", "cachedb/index/sqlite/connection.py", "    except BaseException:\n        connection.close()\n        raise\n    return connection", "    except BaseException:\n        raise\n    return connection", "tests/index/sqlite/test_leaks.py"),
    Mutation("a failed rebuild closes its connections", "cachedb/operations/rebuild.py", "        with closing(Database(folder)) as new:\n", "        if new := Database(folder):\n", "tests/index/sqlite/test_leaks.py"),
    Mutation("a failed restore closes its connections", "cachedb/operations/restore.py", "        with closing(Database(session.new_folder())) as new:\n", "        if new := Database(session.new_folder()):\n", "tests/index/sqlite/test_leaks.py"),
    Mutation("a failed check of the schema closes its connections", "cachedb/index/drift.py", "        engine.dispose()\n", "        pass\n", "tests/index/sqlite/test_leaks.py"),
    Mutation("a failed migration closes its connections", "migrations/env.py", "    with closing(Database(Path(directory) if directory else default_directory())) as database:\n", "    if database := Database(Path(directory) if directory else default_directory()):\n", "tests/index/sqlite/test_leaks.py"),
    Mutation("a newer release's index is not replaced", "cachedb/operations/restore.py", "                _refuse_newer(database)\n", "", "tests/operations/test_upgrade.py"),
    Mutation("a new index is among the backups before the old one goes", "cachedb/index/sqlite/backups.py", "        os.rename(new.name, staged.name, src_dir_fd=source, dst_dir_fd=target)\n", "        staged = new\n", "tests/operations/test_rebuild.py tests/attacks/test_crashes.py"),
    Mutation("an empty list selects nothing", "cachedb/index/filters.py", "    if not wanted and not filters.has_conditions and not by_default_all:\n", "    if False:\n", "tests/index/test_filters.py -k removes_nothing"),
    Mutation("an order and a limit are no conditions", "cachedb/index/filters.py", "self._replace(sort=None, limit=None) != Filters()", "self != Filters()", "tests/index/test_filters.py -k removes_nothing"),
    Mutation("a pattern that matches nothing is an error", "cachedb/index/filters.py", "    if not ignore_missing:\n        for pattern", "    if False:\n        for pattern", "tests/index/test_filters.py -k may_be_missing"),
    Mutation("SQLite gets no expression that is too deep", "cachedb/index/filters.py", "    if len(patterns) > _PATTERNS_LIMIT:\n", "    if False:\n", "tests/index/test_filters.py -k too_many_patterns"),
    Mutation("two images do not get one name", "cachedb/index/filters.py", "        if new in renamed:\n", "        if False:\n", "tests/index/test_filters.py -k all_or_nothing"),
    Mutation("no tag overwrites an image that is to be tagged", "cachedb/index/filters.py", "        if new != name and new in sources:\n", "        if False:\n", "tests/index/test_filters.py -k all_or_nothing"),
    Mutation("a base has all of its layers in the image", "cachedb/index/filters.py", "        .having(func.count() == len(stack))\n", "", "tests/index/test_filters.py -k layers_are_all"),
    Mutation("a base has fewer layers than the image", "cachedb/index/filters.py", "func.count() > len(stack), ", "", "tests/index/test_filters.py -k layers_are_all"),
    Mutation("images are selected under the lock that removes them", "cachedb/cache.py", "            with self._database.write() as connection:\n                found = find_images(connection, wanted, filters, exact=True, ignore_missing=ignore_missing)\n", "            with self._database.read() as connection:\n                found = find_images(connection, wanted, filters, exact=True, ignore_missing=ignore_missing)\n            with self._database.write() as connection:\n", "tests/index/test_filters.py -k before_the_lock"),
    Mutation("`rm` needs names or conditions", "cachedb/cli/options.py", "    if not names and not ignore_missing and not (filters and filters.has_conditions):\n", "    if False:\n", "tests/index/test_filters.py -k exit_as_documented"),
    Mutation("a table that is too wide is not folded", "cachedb/cli/output.py", "    if sum(least) > room:\n        return None\n", "", "tests/cli/test_fields.py -k cuts_no_name"),
    Mutation("the index of an archive lists all of its images", "cachedb/transports/archive/entries.py", '        elif entry.path in ("index.json", "manifest.json"):\n', "        elif False:\n", "tests/transports/archive/test_write.py -k share_its_blobs"),
    Mutation("only one image gets a tag in an archive", "cachedb/operations/export_archive.py", "        if len(held) > 1 and (tag is not None", "        if False and (tag is not None", "tests/transports/archive/test_write.py -k only_one_image"),
    Mutation("an ambiguous digest is refused", "cachedb/index/blobs.py", "    if len(found) > 1:\n", "    if False:\n", "tests/index/test_blobs.py -k ambiguous"),
    Mutation("an ambiguous digest in a name is refused", "cachedb/index/filters.py", "    if len(found) > 1:\n", "    if False:\n", "tests/index/test_blobs.py -k unique_in_its_repository"),
    Mutation("a name goes before the first digits of a digest", "cachedb/content/held.py", "    if not is_digest(prefix) and images.look_up(", "    if False and images.look_up(", "tests/index/test_blobs.py -k looks_like_a_digest"),
    Mutation("`verify` names the images of a damaged blob", "cachedb/operations/verify.py", 'images=tuple(names.get(problem.digest or "", ()))', "images=()", "tests/operations/test_verify.py -k names_all_images"),
    Mutation("what a process has just used is not unused", "cachedb/cache.py", "        if filters is not None:\n            self._uses.write()", "        if False:\n            self._uses.write()", "tests/index/test_filters.py -k just_read"),
    Mutation("filters of a wrong type are refused", "cachedb/index/filters.py", "    if not isinstance(filters, Filters):\n", "    if False:\n", "tests/test_arguments.py -k wrong_type"),
    Mutation("no control character reaches a column", "cachedb/cli/fields.py", "printable(field.show(value))", "field.show(value)", "tests/cli/test_fields.py -k control_characters"),
]  # fmt: skip


def mutate(mutation: Mutation) -> str:
    """Return the text of the file without the protection.

    Raises:
        ValueError: if the line does not occur exactly once, or a module is not valid Python or uses a name that nothing
            defines. Any test that runs the line would notice such a mutation.
    """
    text = (CHECKOUT / mutation.file).read_text()
    if text.count(mutation.line) != 1:
        raise ValueError(f"{mutation.what}: {mutation.file} has this line {text.count(mutation.line)} times, not once")
    changed = text.replace(mutation.line, mutation.without)
    if not mutation.file.endswith(".py"):
        return changed
    try:
        added = _find_undefined_names(changed) - _find_undefined_names(text)
    except SyntaxError as error:
        raise ValueError(f"{mutation.what}: {mutation.file} would not be valid Python: {error}") from None
    if added:
        raise ValueError(f"{mutation.what}: {mutation.file} would use undefined names: {', '.join(sorted(added))}")
    return changed


def _find_undefined_names(code: str) -> set[str]:
    """Return the names that the code reads as global or built-in, but that are neither."""
    module = symtable.symtable(code, "mutated", "exec")
    defined = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    read: set[str] = set()
    scopes = [module]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            is_global = scope is module or symbol.is_global()
            if is_global and symbol.is_referenced():
                read.add(symbol.get_name())
            if symbol.is_declared_global() and symbol.is_assigned():
                defined.add(symbol.get_name())
    return read - defined - set(dir(builtins))


def find_failure(mutation: Mutation, scratch: Path) -> tuple[str | None, float]:
    """Run the tests on a mutated copy; return the failed test, or None, and the seconds they took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        Path(name).chmod(0o755)  # some tests become another user for a while
        copy = Path(name) / "checkout"
        ignored = shutil.ignore_patterns(".git", ".venv", "*_cache", "__pycache__", ".hypothesis")
        shutil.copytree(CHECKOUT, copy, ignore=ignored)
        (copy / mutation.file).write_text(mutate(mutation))
        # With PYTHONPATH, also the processes that a test starts import the copy, not an installed package.
        environment = {**os.environ, "PYTHONPATH": str(copy), "TMPDIR": name, "CACHEDB_POWER_CUTS": POWER_CUTS}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutation.tests)]
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return "a test that did not end", time.monotonic() - began
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutation.what}: pytest failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return (found[1] if found else "a test") if done.returncode else None, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.mutations", description=__doc__.partition(":")[0])
    parser.add_argument("words", nargs="*", help="only mutations whose name or file contains one of these")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth mutation (1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutations to run at once (all CPUs)")
    parser.add_argument("--control", action="store_true", help="first run the tests without a mutation; they must pass")
    options = parser.parse_args()
    chosen = [
        mutation
        for mutation in MUTATIONS[:: options.every]
        if not options.words or any(word in f"{mutation.what} {mutation.file}" for word in options.words)
    ]
    gaps = 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        Path(scratch).chmod(0o755)
        if options.control:
            tests = " ".join(sorted({test for mutation in chosen for test in shlex.split(mutation.tests)}))
            docstring = '"""Define the errors'  # replaced by itself
            control = Mutation("no mutation", "cachedb/errors.py", docstring, docstring, tests)
            failed, seconds = find_failure(control, Path(scratch))
            print(f"{control.what:68} {seconds:4.0f} s  {failed or 'all tests pass'}", flush=True)
            if failed:
                return 1
        for mutation, (test, seconds) in zip(
            chosen, pool.map(lambda mutation: find_failure(mutation, Path(scratch)), chosen), strict=True
        ):
            gaps += test is None
            print(f"{mutation.what:68} {seconds:4.0f} s  {test or 'NO TEST FAILED'}", flush=True)
    print(f"{len(chosen)} mutations, {gaps} without a failed test")
    return 1 if gaps else 0


if __name__ == "__main__":
    leftovers.start_watcher()
    sys.exit(main())
