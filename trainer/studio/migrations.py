"""The migrations of the database's schema, oldest first, and the code that applies them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from trainer.files import PARTIAL, fsync

# In triggers: any end of a tune or prompt notes its callback in the same transaction.
TRIGGERS = """
    CREATE TRIGGER tune_ended AFTER UPDATE OF status ON tunes
    WHEN NEW.callback IS NOT NULL AND NEW.status IS NOT OLD.status AND NEW.status IN ('trained', 'failed', 'canceled')
    BEGIN
        INSERT INTO callbacks (tune_id, kind, url, created_at, due_at)
        VALUES (NEW.id, 'tune', NEW.callback, NEW.updated_at, NEW.updated_at);
    END;
    CREATE TRIGGER prompt_ended AFTER UPDATE OF status ON prompts
    WHEN NEW.status IS NOT OLD.status AND NEW.status IN ('rendered', 'failed', 'canceled')
    BEGIN
        INSERT INTO callbacks (tune_id, prompt_id, kind, url, created_at, due_at)
        SELECT NEW.tune_id, NEW.id, 'prompt', NEW.callback, NEW.updated_at, NEW.updated_at
        WHERE NEW.callback IS NOT NULL;
        INSERT INTO callbacks (tune_id, kind, url, created_at, due_at)
        SELECT id, 'prompts', prompts_callback, NEW.updated_at, NEW.updated_at FROM tunes
        WHERE id = NEW.tune_id AND prompts_callback IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM prompts WHERE tune_id = NEW.tune_id AND status IN ('queued', 'rendering'))
        AND NOT EXISTS (SELECT 1 FROM callbacks WHERE tune_id = NEW.tune_id AND kind = 'prompts');
    END;
"""
# Applied in order, each in one transaction; `user_version` counts them. Never edit a released migration: add another.
MIGRATIONS = [
    """
    CREATE TABLE tunes (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        title TEXT NOT NULL, name TEXT NOT NULL, token TEXT, branch TEXT NOT NULL, model_type TEXT,
        method TEXT NOT NULL, preset TEXT, base_tune_id INTEGER, base_id INTEGER NOT NULL, steps INTEGER, args TEXT,
        face_crop INTEGER, training_face_correct INTEGER NOT NULL, auto_extend INTEGER NOT NULL, callback TEXT,
        characteristics TEXT NOT NULL, photos TEXT NOT NULL, files TEXT NOT NULL DEFAULT '[]',
        status TEXT NOT NULL, cancel INTEGER NOT NULL DEFAULT 0, progress TEXT NOT NULL DEFAULT '{}',
        error TEXT, warnings TEXT NOT NULL,
        eta TEXT, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
        started_training_at TEXT, trained_at TEXT, expires_at TEXT
    ) STRICT;
    CREATE INDEX tunes_title ON tunes (title);
    CREATE TABLE prompts (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        tune_id INTEGER NOT NULL REFERENCES tunes (id) ON DELETE CASCADE,
        text TEXT NOT NULL, negative_prompt TEXT, num_images INTEGER NOT NULL, seed INTEGER, steps INTEGER,
        cfg_scale REAL, w INTEGER, h INTEGER, callback TEXT, files TEXT NOT NULL DEFAULT '[]',
        status TEXT NOT NULL, cancel INTEGER NOT NULL DEFAULT 0, error TEXT, warnings TEXT NOT NULL,
        created_at TEXT NOT NULL, updated_at TEXT NOT NULL, started_training_at TEXT, trained_at TEXT
    ) STRICT;
    CREATE INDEX prompts_tune ON prompts (tune_id);
    -- What is still to be done, oldest first. A row stays until its work has ended, so that a crash loses nothing.
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        tune_id INTEGER NOT NULL REFERENCES tunes (id) ON DELETE CASCADE,
        prompt_id INTEGER REFERENCES prompts (id) ON DELETE CASCADE,
        attempts INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    """,
    """
    ALTER TABLE tunes ADD COLUMN prompts_callback TEXT;
    ALTER TABLE prompts ADD COLUMN kept TEXT NOT NULL DEFAULT '{}';  -- attributes that are not rendered yet
    -- What is still to be posted, or was, to the address that a request gave. `due_at` NULL: nothing more is tried.
    CREATE TABLE callbacks (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        tune_id INTEGER NOT NULL REFERENCES tunes (id) ON DELETE CASCADE,
        prompt_id INTEGER REFERENCES prompts (id) ON DELETE CASCADE,
        kind TEXT NOT NULL, url TEXT NOT NULL, created_at TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0, due_at TEXT, arrived_at TEXT, answer TEXT
    ) STRICT;
    CREATE INDEX callbacks_due ON callbacks (due_at) WHERE due_at IS NOT NULL;
    CREATE INDEX callbacks_tune ON callbacks (tune_id);
    """
    + TRIGGERS
    + """
    -- The header Idempotency-Key, and what the request was that had it.
    ALTER TABLE tunes ADD COLUMN request_key TEXT;
    ALTER TABLE tunes ADD COLUMN request_digest TEXT;
    CREATE UNIQUE INDEX tunes_request ON tunes (request_key) WHERE request_key IS NOT NULL;
    ALTER TABLE prompts ADD COLUMN request_key TEXT;
    ALTER TABLE prompts ADD COLUMN request_digest TEXT;
    CREATE UNIQUE INDEX prompts_request ON prompts (request_key) WHERE request_key IS NOT NULL;
    """,
    """
    CREATE INDEX tunes_base ON tunes (base_id);
    ALTER TABLE prompts ADD COLUMN base_id INTEGER;  -- NULL: the base of its tune
    -- A trained tune in another format, made when it is first asked for.
    CREATE TABLE exports (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        tune_id INTEGER NOT NULL REFERENCES tunes (id) ON DELETE CASCADE,
        format TEXT NOT NULL, files TEXT NOT NULL DEFAULT '[]', status TEXT NOT NULL, cancel INTEGER NOT NULL DEFAULT 0,
        error TEXT, created_at TEXT NOT NULL, updated_at TEXT NOT NULL, started_training_at TEXT,
        UNIQUE (tune_id, format)
    ) STRICT;
    ALTER TABLE jobs ADD COLUMN export_id INTEGER REFERENCES exports (id) ON DELETE CASCADE;
    -- Words that came with the new model types; a LoRA that waits has them as they were.
    UPDATE tunes SET args = args || ' optimizer=adamw trained_dtype=float32 on_top=continue tokens=0 token_lr=0'
        || ' token_share=0' WHERE args IS NOT NULL AND instr(args, 'on_top=') = 0;
    """,
    """
    ALTER TABLE prompts ADD COLUMN attributes TEXT NOT NULL DEFAULT '{}';  -- what is wanted beside the columns
    ALTER TABLE prompts ADD COLUMN named TEXT NOT NULL DEFAULT 'null';  -- the models in its text; null: not looked up
    ALTER TABLE prompts ADD COLUMN progress TEXT NOT NULL DEFAULT '{}';
    """,
    """
    ALTER TABLE prompts ADD COLUMN parsed TEXT NOT NULL DEFAULT 'null';  -- its text, parsed; null: not yet
    """,
    """
    -- Two resumes at once could queue a tune several times, and a job could outlive the end of its work.
    DELETE FROM jobs WHERE id NOT IN (SELECT MIN(id) FROM jobs GROUP BY tune_id, prompt_id, export_id);
    DELETE FROM jobs WHERE prompt_id IS NULL AND export_id IS NULL
        AND tune_id IN (SELECT id FROM tunes WHERE status NOT IN ('queued', 'training'));
    DELETE FROM jobs WHERE prompt_id IN (SELECT id FROM prompts WHERE status NOT IN ('queued', 'rendering'));
    DELETE FROM jobs WHERE export_id IN (SELECT id FROM exports WHERE status NOT IN ('queued', 'exporting'));

    ALTER TABLE tunes ADD COLUMN body_digest TEXT;  -- sha256 of the parsed request; NULL: of an older version
    CREATE INDEX tunes_body ON tunes (body_digest) WHERE body_digest IS NOT NULL;
    -- sha256 of the files of a finished model. path: in the tune's folder.
    CREATE TABLE checksums (
        tune_id INTEGER NOT NULL REFERENCES tunes (id) ON DELETE CASCADE,
        path TEXT NOT NULL, sha256 TEXT NOT NULL,
        PRIMARY KEY (tune_id, path)
    ) STRICT;
    -- Folders whose rows are deleted, until they are removed too. path: in the outputs folder.
    CREATE TABLE deletions (path TEXT PRIMARY KEY) STRICT;

    -- A prompt on a base belongs to the base: tune_id may be NULL, in jobs and callbacks too.
    DROP TRIGGER tune_ended;
    DROP TRIGGER prompt_ended;
    CREATE TABLE new_prompts (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        tune_id INTEGER REFERENCES tunes (id) ON DELETE CASCADE,  -- whose folder has its files; NULL: the base's folder
        base_id INTEGER,  -- where it was posted; NULL: on its tune
        lora_id INTEGER REFERENCES tunes (id) ON DELETE SET NULL,  -- on a base: the first tune that the text names
        text TEXT NOT NULL, negative_prompt TEXT, num_images INTEGER NOT NULL, seed INTEGER, steps INTEGER,
        cfg_scale REAL, w INTEGER, h INTEGER, callback TEXT, files TEXT NOT NULL DEFAULT '[]',
        status TEXT NOT NULL, cancel INTEGER NOT NULL DEFAULT 0, error TEXT, warnings TEXT NOT NULL,
        created_at TEXT NOT NULL, updated_at TEXT NOT NULL, started_training_at TEXT, trained_at TEXT,
        kept TEXT NOT NULL DEFAULT '{}',  -- attributes that are not rendered
        attributes TEXT NOT NULL DEFAULT '{}',  -- attributes without a column of their own
        named TEXT NOT NULL DEFAULT 'null',  -- the models in its text; null: not looked up yet
        progress TEXT NOT NULL DEFAULT '{}',
        parsed TEXT NOT NULL DEFAULT 'null',  -- its text, parsed; null: not yet
        request_key TEXT, request_digest TEXT, body_digest TEXT,
        CHECK (tune_id IS NOT NULL OR base_id IS NOT NULL)
    ) STRICT;
    INSERT INTO new_prompts (
        id, tune_id, base_id, text, negative_prompt, num_images, seed, steps, cfg_scale, w, h, callback, files, status,
        cancel, error, warnings, created_at, updated_at, started_training_at, trained_at, kept, attributes, named,
        progress, parsed, request_key, request_digest
    ) SELECT
        id, tune_id, base_id, text, negative_prompt, num_images, seed, steps, cfg_scale, w, h, callback, files, status,
        cancel, error, warnings, created_at, updated_at, started_training_at, trained_at, kept, attributes, named,
        progress, parsed, request_key, request_digest
    FROM prompts;
    CREATE TABLE new_jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        tune_id INTEGER REFERENCES tunes (id) ON DELETE CASCADE,
        prompt_id INTEGER REFERENCES prompts (id) ON DELETE CASCADE,
        export_id INTEGER REFERENCES exports (id) ON DELETE CASCADE,
        attempts INTEGER NOT NULL DEFAULT 0,
        CHECK (tune_id IS NOT NULL OR prompt_id IS NOT NULL)
    ) STRICT;
    INSERT INTO new_jobs (id, tune_id, prompt_id, export_id, attempts)
        SELECT id, tune_id, prompt_id, export_id, attempts FROM jobs;
    CREATE TABLE new_callbacks (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        tune_id INTEGER REFERENCES tunes (id) ON DELETE CASCADE,
        prompt_id INTEGER REFERENCES prompts (id) ON DELETE CASCADE,
        kind TEXT NOT NULL, url TEXT NOT NULL, created_at TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0, due_at TEXT, arrived_at TEXT, answer TEXT,
        delay REAL NOT NULL DEFAULT 0  -- seconds that were planned between the last attempt and due_at
    ) STRICT;
    INSERT INTO new_callbacks (
        id, tune_id, prompt_id, kind, url, created_at, attempts, due_at, arrived_at, answer, delay
    ) SELECT
        id, tune_id, prompt_id, kind, url, created_at, attempts, due_at, arrived_at, answer,
        CASE attempts WHEN 0 THEN 0 ELSE 86400 END  -- the longest there was
    FROM callbacks;
    -- The numbers of deleted rows are not used again.
    DELETE FROM sqlite_sequence WHERE name IN ('new_prompts', 'new_jobs', 'new_callbacks');
    INSERT INTO sqlite_sequence (name, seq)
        SELECT 'new_' || name, seq FROM sqlite_sequence WHERE name IN ('prompts', 'jobs', 'callbacks');
    DROP TABLE callbacks;
    DROP TABLE jobs;
    DROP TABLE prompts;
    ALTER TABLE new_prompts RENAME TO prompts;
    ALTER TABLE new_jobs RENAME TO jobs;
    ALTER TABLE new_callbacks RENAME TO callbacks;

    CREATE INDEX prompts_tune ON prompts (tune_id);
    CREATE INDEX prompts_base ON prompts (base_id) WHERE base_id IS NOT NULL;
    CREATE INDEX prompts_lora ON prompts (lora_id) WHERE lora_id IS NOT NULL;
    CREATE UNIQUE INDEX prompts_request ON prompts (request_key) WHERE request_key IS NOT NULL;
    CREATE INDEX prompts_body ON prompts (body_digest) WHERE body_digest IS NOT NULL;
    -- One piece of work has one job.
    CREATE UNIQUE INDEX jobs_tune ON jobs (tune_id) WHERE prompt_id IS NULL AND export_id IS NULL;
    CREATE UNIQUE INDEX jobs_prompt ON jobs (prompt_id) WHERE prompt_id IS NOT NULL;
    CREATE UNIQUE INDEX jobs_export ON jobs (export_id) WHERE export_id IS NOT NULL;
    CREATE INDEX callbacks_due ON callbacks (due_at) WHERE due_at IS NOT NULL;
    CREATE INDEX callbacks_tune ON callbacks (tune_id);
    """
    + TRIGGERS,
    """
    ALTER TABLE prompts ADD COLUMN liked_at TEXT;  -- NULL: no user likes its pictures
    """,
]


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Migrate a database to the newest schema, after a backup; check its integrity.

    path: its file. Raises RuntimeError for a damaged database and for one of a newer version, and sqlite3.Error.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise RuntimeError(f"{path} was made by a newer version of Tunebooth; upgrade to open it")
    if 0 < version < len(MIGRATIONS):
        back_up(db, path.with_name(f"{path.name}.version-{version}"))
    db.execute("PRAGMA foreign_keys=OFF")  # a rebuilt table is dropped first (sqlite.org/lang_altertable.html)
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        try:
            db.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")
        except sqlite3.Error:
            if db.in_transaction:
                db.rollback()
            raise
    if broken := db.execute("PRAGMA foreign_key_check").fetchall():
        raise damaged(path, f"{len(broken)} rows name rows that are missing")
    db.execute("PRAGMA foreign_keys=ON")
    check = db.execute("PRAGMA integrity_check").fetchone()[0]
    if check != "ok":
        raise damaged(path, check)


def back_up(db: sqlite3.Connection, target: Path) -> None:
    """Copy a database to a file that is complete or absent."""
    partial = target.with_name(f"{target.name}{PARTIAL}")
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(partial)) as copy:
        db.backup(copy)
    fsync(partial)
    partial.rename(target)
    fsync(target.parent)


def damaged(path: Path, how: str) -> RuntimeError:
    """The error of a database that cannot be read."""
    return RuntimeError(f"{path} is damaged ({how}); restore a copy, or move it away to start with an empty database")
