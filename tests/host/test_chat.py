"""Chat templates: rendering, refusals, and the sandbox around a stranger's template."""

import pytest
from skipopu.host.chat import ChatTemplate
from skipopu.host.errors import ModelError

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(("source", "expected"), [
    ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hello</s>"),
    ("{% if add_generation_prompt %}A:{% endif %}", "A:"),
    ("{%- for m in messages %}\n  {% if m %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),  # blocks leave no blanks
    ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello"}]'),
    ("{{ 'ü<' | tojson }}", '"ü<"'),
    ("{{ strftime_now('%Y') | length }}", "4"),
])
def test_renders(source, expected):
    assert ChatTemplate(source, bos="<s>", eos="</s>").render(HELLO) == expected


def test_generation_prompt_is_optional():
    template = ChatTemplate("{% if add_generation_prompt %}A:{% endif %}")
    assert template.render(HELLO, add_generation_prompt=False) == ""


@pytest.mark.parametrize(("source", "message"), [
    ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
    ("{{ messages[5].content }}", "refused the messages"),
    ("{{ ''.__class__.__mro__ }}", "refused the messages: access to attribute '__class__'"),
    ("{{ messages.append(1) }}", "refused the messages"),
    ("{{ range(10**9) | list }}", "refused the messages: Range too big"),
    ("{{ 1 // 0 }}", "refused the messages"),
])
def test_refuses_to_render(source, message):
    with pytest.raises(ModelError, match=message):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% endfor %}"])
def test_refuses_to_compile(source):
    with pytest.raises(ModelError, match="chat template does not compile"):
        ChatTemplate(source)
