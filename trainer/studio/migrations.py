"""The migrations of the database's schema, oldest first."""

from __future__ import annotations

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
    -- In triggers, so that whatever ends a tune or a prompt notes the callback in the same transaction.
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
]
