"""What holds for every source: its name, its recipe, and one line where the folder is another one."""

from importlib import import_module

import pytest

from imitate_ds.data.shard_recipe import load_recipe
from imitate_ds.data.sources import SOURCES, open_source


@pytest.mark.parametrize("name", SOURCES)
def test_it_has_the_name_that_opens_it(name):
    module, class_name = SOURCES[name]
    source = getattr(import_module(f"imitate_ds.data.sources.{module}"), class_name)
    assert source.name == name
    assert source.synthetic == (name == "phantom")


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"phantom"}))
def test_its_recipe_has_its_options_and_another_folder_is_refused(name, repository, tmp_path):
    recipe = load_recipe(repository / "shards" / f"{name.replace('-', '_')}.yaml", root=tmp_path)
    assert recipe.source == name
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}.*: (no|expected) "):
        open_source(recipe.source, recipe.root, **recipe.options)


def test_what_no_source_knows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source = 'nih': must be one of openi, mimic-cxr, chexpert-plus, chexpert"):
        open_source("nih", tmp_path)
    with pytest.raises(ValueError, match="reader is not an option of source siim; it has: splits"):
        open_source("siim", tmp_path, reader="R9")
    with pytest.raises(ValueError, match="option splits = 5: must be a text"):
        open_source("siim", tmp_path, splits=5)
